// The rows on the two principal directions of their gradients; a lasso lists those inside.

import { get, question } from "/page/api.js";
import { by, card, el, number, visible } from "/page/dom.js";
import { change, read } from "/page/state.js";

const LISTED = 100;
const EDGE = 14; // pixels around the cloud
const COLOURS = 8;
const canvas = by("cloud");
let cloud = null;
let drawing = [];
let cross = null;

export async function show(now, known, stale) {
  const scored = known.targets.length > 0;
  by("colours").colour.value = now.colour;
  const found = await get("/v1/map", { ...question(now), scored, wait: 1 }, stale);
  if (stale()) return;
  cloud = { ...found, known, colour: scored ? now.colour : "source", box: bounds(found) };
  by("explained").textContent = `The axes show ${(100 * (found.explained[0] + found.explained[1])).toFixed(1)} % `
    + `of the variance; ${number(found.row.length)} of ${number(found.usable_rows)} usable rows are drawn.`;
  canvas.setAttribute("aria-label", `Map of ${number(found.row.length)} rows, coloured by ${cloud.colour}`);
  legend();
  drawing = corners(now.lasso);
  paint();
  await list(inside(drawing), stale, scored, now);
}

const corners = (text) => text.split(";").filter(Boolean).map((pair) => pair.split(",").map(Number));
const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function bounds({ x, y }) {
  const span = (values) => {
    let low = Infinity, high = -Infinity;
    for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
    return high > low ? [low, high] : [low - 1, low + 1];
  };
  return { x: span(x), y: span(y) };
}

function scale() {
  const { width, height } = canvas.getBoundingClientRect();
  const along = ([low, high], size) => [(size - 2 * EDGE) / (high - low), low];
  const [sx, x0] = along(cloud.box.x, width), [sy, y0] = along(cloud.box.y, height);
  return {
    width, height,
    to: ([x, y]) => [EDGE + (x - x0) * sx, height - EDGE - (y - y0) * sy],
    from: ([px, py]) => [(px - EDGE) / sx + x0, (height - EDGE - py) / sy + y0],
  };
}

const sourceColour = (code) => ink(`--c${code < 0 ? COLOURS - 1 : Math.min(code, COLOURS - 1)}`);

function painter() {
  if (cloud.colour !== "score") {
    const inks = new Map();
    return (i) => {
      const code = cloud.source[i];
      if (!inks.has(code)) inks.set(code, sourceColour(code));
      return inks.get(code);
    };
  }
  const most = cloud.score.reduce((best, value) => Math.max(best, Math.abs(value ?? 0)), 0) || 1;
  const [good, bad, soft] = ["--good", "--bad", "--soft"].map(ink);
  return (i) => {
    const share = Math.round((100 * Math.abs(cloud.score[i])) / most);
    return `color-mix(in oklab, ${cloud.score[i] < 0 ? bad : good} ${share}%, ${soft})`;
  };
}

function paint() {
  const { width, height, to } = scale();
  const ratio = devicePixelRatio || 1;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const colour = painter();
  const size = cloud.row.length > 5000 ? 2 : 4;
  context.globalAlpha = cloud.row.length > 5000 ? 0.6 : 0.85;
  for (let i = 0; i < cloud.row.length; i++) {
    const [x, y] = to([cloud.x[i], cloud.y[i]]);
    context.fillStyle = colour(i);
    context.fillRect(x - size / 2, y - size / 2, size, size);
  }
  context.globalAlpha = 1;
  context.strokeStyle = context.fillStyle = ink("--ink");
  const path = new Path2D();
  drawing.map(to).forEach(([x, y], i) => (i ? path.lineTo(x, y) : path.moveTo(x, y)));
  if (drawing.length > 2) path.closePath();
  context.stroke(path);
  if (cross) {
    const [x, y] = to(cross);
    context.fillRect(x - 8, y - 0.5, 16, 1);
    context.fillRect(x - 0.5, y - 8, 1, 16);
    for (const corner of drawing.map(to)) context.fillRect(corner[0] - 2, corner[1] - 2, 4, 4);
  }
}

// Positions of the points within a polygon: an odd number of its sides lie to their right.
function inside(polygon) {
  const found = [];
  if (polygon.length < 3) return found;
  for (let i = 0; i < cloud.row.length; i++) {
    let odd = false;
    for (let a = 0, b = polygon.length - 1; a < polygon.length; b = a++) {
      const [ax, ay] = polygon[a], [bx, by_] = polygon[b];
      const crosses = ay > cloud.y[i] !== by_ > cloud.y[i];
      if (crosses && cloud.x[i] < ((bx - ax) * (cloud.y[i] - ay)) / (by_ - ay) + ax) odd = !odd;
    }
    if (odd) found.push(i);
  }
  return found;
}

async function list(points, stale, scored, now) {
  by("lassoed").textContent = points.length
    ? `${number(points.length)} rows lassoed${points.length > LISTED ? `, the first ${LISTED}` : ""}`
    : "No rows lassoed";
  const rows = points.slice(0, LISTED).map((i) => cloud.row[i]);
  if (!rows.length) return by("lasso-rows").replaceChildren();
  const sort = scored ? "-score" : "row";
  const page = await get("/v1/rows", { ...question(now), scored, sort, row: rows, limit: LISTED, wait: 30 }, stale);
  if (stale()) return undefined;
  const { known } = cloud;
  return by("lasso-rows").replaceChildren(...page.rows.map((line, i) => card({ score: null, ...line }, i + 1,
    new Set(), (row) => known.open(row, page.generation), known.without)));
}

function legend() {
  if (cloud.colour === "score") {
    by("legend").replaceChildren(...[["--bad", "hurts"], ["--soft", "neither"], ["--good", "helps"]].map(dot));
    return;
  }
  const names = cloud.sources.slice(0, COLOURS - 1).map((name, i) => [`--c${i}`, visible(name)]);
  if (cloud.sources.length >= COLOURS) names.push([`--c${COLOURS - 1}`, `${cloud.sources.length - COLOURS + 1} others`]);
  by("legend").replaceChildren(...(names.length ? names : [[`--c${COLOURS - 1}`, "source not known"]]).map(dot));
}

function dot([colour, text]) {
  const spot = el("i", {});
  spot.style.background = `var(${colour})`;
  return el("li", {}, spot, text);
}

function keep() {
  const text = drawing.map((corner) => corner.map((value) => value.toPrecision(4)).join(",")).join(";");
  change({ lasso: text });
}

function nearest(point) {
  const { to } = scale();
  let best = -1, least = 100; // within 10 pixels
  for (let i = 0; i < cloud.row.length; i++) {
    const [x, y] = to([cloud.x[i], cloud.y[i]]);
    const far = (x - point[0]) ** 2 + (y - point[1]) ** 2;
    if (far < least) [best, least] = [i, far];
  }
  return best;
}

let held = false;
const pixel = (event) => {
  const around = canvas.getBoundingClientRect();
  return [event.clientX - around.left, event.clientY - around.top];
};
canvas.addEventListener("pointerdown", (event) => {
  if (!cloud) return;
  held = true;
  cross = null;
  canvas.setPointerCapture(event.pointerId);
  drawing = [scale().from(pixel(event))];
});
canvas.addEventListener("pointermove", (event) => {
  if (!held) return;
  const { to, from } = scale();
  const [x, y] = pixel(event), [px, py] = to(drawing.at(-1));
  if ((x - px) ** 2 + (y - py) ** 2 < 36) return; // a corner every six pixels
  drawing.push(from([x, y]));
  paint();
});
canvas.addEventListener("pointerup", (event) => {
  if (!held) return;
  held = false;
  if (drawing.length > 2) return keep();
  const point = nearest(pixel(event));
  drawing = corners(read().lasso);
  paint();
  if (point >= 0) cloud.known.open(cloud.row[point], cloud.generation);
  return undefined;
});
canvas.addEventListener("keydown", (event) => {
  if (!cloud) return;
  const { from, to, width, height } = scale();
  cross ??= from([width / 2, height / 2]);
  const moves = { ArrowLeft: [-10, 0], ArrowRight: [10, 0], ArrowUp: [0, -10], ArrowDown: [0, 10] };
  const [x, y] = to(cross);
  if (event.key in moves) cross = from([x + moves[event.key][0], y + moves[event.key][1]]);
  else if (event.key === "Enter") { drawing = [...drawing, cross]; if (drawing.length > 2) keep(); }
  else if (event.key === "Backspace") { drawing = drawing.slice(0, -1); keep(); }
  else if (event.key === "Escape") { drawing = []; keep(); }
  else return;
  event.preventDefault();
  paint();
});
by("clear-lasso").addEventListener("click", () => change({ lasso: "" }));
by("colours").addEventListener("change", (event) => change({ colour: event.target.value }));
addEventListener("resize", () => cloud && read().view === "map" && paint());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => cloud && paint());
