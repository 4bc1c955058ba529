// Requests to /v1. A problem document becomes an Error with its message; 202 is waited for, and
// given up once a newer question has taken its place: the job ends, if nobody else waits for it.

const pause = (ms) => new Promise((done) => setTimeout(done, ms));
let status = () => {};

export function tellStatus(listener) {
  status = listener;
}

// Equal questions share one job, so each question has a name of its own to be let go by.
const nextName = () => Array.from(crypto.getRandomValues(new Uint32Array(4)), (n) => n.toString(36)).join("-");

async function send(path, options, stale) {
  const headers = { ...options.headers, "Gradstore-Waiter": nextName() };
  for (;;) {
    const answer = await fetch(path, { ...options, headers });
    const waiting = answer.status === 202;
    const job = waiting && answer.headers.get("Location");
    const moveOn = () => {
      if (!stale?.()) return;
      if (job) fetch(job, { method: "DELETE", headers }).catch(() => {});
      throw new Stale();
    };
    moveOn();
    if (answer.status === 429) {
      await pause(1000 * Number(answer.headers.get("Retry-After") ?? 1));
      moveOn();
      continue;
    }
    const content = await answer.json().catch(() => ({}));
    if (!waiting) {
      if (answer.ok) return content;
      throw new Error(content.detail ?? `${answer.status} ${answer.statusText}`);
    }
    moveOn();
    status(`${content.kind}: ${content.stage || `${Math.round(100 * content.progress)} %`}`);
    await pause(300);
    moveOn();
  }
}

// A newer question has taken the place of one that was still being answered.
export class Stale extends Error {}

export function pathOf(path, parameters) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters)) {
    if (value === "" || value === null || value === undefined) continue;
    for (const each of Array.isArray(value) ? value : [value]) query.append(name, each);
  }
  const text = query.toString();
  return text ? `${path}?${text}` : path;
}

export function get(path, parameters = {}, stale) {
  return send(pathOf(path, parameters), {}, stale);
}

export function post(path, body, stale) {
  return send(`${path}?wait=1`, {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  }, stale);
}

// What the API calls a question, from the page's state.
export function question(state) {
  const asked = { checkpoints: state.checkpoints };
  if (state.run) asked.run = state.run;
  if (state.step !== "") asked.step = Number(state.step);
  if (state.target) asked.target = [state.target];
  if (state.row !== "" && Number(state.row) >= 0) asked.target_row = Math.floor(Number(state.row));
  return asked;
}
