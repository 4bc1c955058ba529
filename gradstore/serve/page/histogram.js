// A histogram that filters: draw over it, or move its two ends by keyboard.

import { el, signed } from "/page/dom.js";

const SVG = "http://www.w3.org/2000/svg";
const HIGH = 100;

function shape(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

// `edges` has one number more than `counts`; `min` and `max` are scores or "". `pick(min, max)` is
// called with scores, "" at an end that does not filter.
export function histogram(box, { edges, counts }, min, max, pick) {
  const bins = counts.length;
  const nearest = (score) => edges.reduce((best, edge, i) =>
    (Math.abs(edge - score) < Math.abs(edges[best] - score) ? i : best), 0);
  let low = min === "" ? 0 : nearest(Number(min));
  let high = max === "" ? bins : nearest(Number(max));
  const svg = shape("svg", { viewBox: `0 0 ${bins} ${HIGH}`, preserveAspectRatio: "none",
    role: "img", "aria-label": "Scores of all usable rows; the two sliders below filter" });
  const tallest = Math.max(...counts, 1);
  const bars = counts.map((count, i) => {
    const height = count ? Math.max((HIGH * count) / tallest, 1.5) : 0;
    const bar = shape("rect", { x: i + 0.05, width: 0.9, y: HIGH - height, height });
    const title = shape("title", {});
    title.textContent = `${count} rows from ${signed(edges[i])} to ${signed(edges[i + 1])}`;
    bar.append(title);
    return bar;
  });
  svg.append(...bars);
  const ends = ["from", "to"].map((name) => {
    const input = el("input", { type: "range", min: 0, max: bins, step: 1, name, "aria-label": `Score ${name}` });
    return { input, said: el("output", {}), name };
  });
  const paint = () => {
    bars.forEach((bar, i) => bar.setAttribute("class", i >= low && i < high ? "bar in" : "bar"));
    [low, high].forEach((at, i) => {
      ends[i].input.value = at;
      ends[i].said.textContent = signed(edges[at]);
      ends[i].input.setAttribute("aria-valuetext", signed(edges[at]));
    });
  };
  const done = () => pick(low === 0 ? "" : edges[low], high === bins ? "" : edges[high]);
  ends.forEach(({ input }, i) => {
    input.addEventListener("input", () => {
      if (i === 0) low = Math.min(Number(input.value), high - 1);
      else high = Math.max(Number(input.value), low + 1);
      paint();
    });
    input.addEventListener("change", done);
  });
  let from = null;
  const at = (event) => {
    const around = svg.getBoundingClientRect();
    return Math.min(Math.max(((event.clientX - around.left) / around.width) * bins, 0), bins);
  };
  svg.addEventListener("pointerdown", (event) => {
    from = at(event);
    svg.setPointerCapture(event.pointerId);
  });
  svg.addEventListener("pointermove", (event) => {
    if (from === null) return;
    const to = at(event);
    low = Math.min(Math.floor(Math.min(from, to)), bins - 1);
    high = Math.max(Math.ceil(Math.max(from, to)), low + 1);
    paint();
  });
  svg.addEventListener("pointerup", () => {
    if (from === null) return;
    from = null;
    done();
  });
  const reset = el("button", { type: "button", onclick: () => pick("", "") }, "All scores");
  box.replaceChildren(svg, el("div", { class: "ends" },
    ...ends.map(({ input, said, name }) => el("label", {}, el("span", {}, `score ${name} `, said), input)), reset));
  paint();
}
