// Requests to /v1. A problem document becomes an Error with its message; 202 is waited for.

const pause = (ms) => new Promise((done) => setTimeout(done, ms));
let status = () => {};

export function tellStatus(listener) {
  status = listener;
}

async function send(path, options, stale) {
  for (;;) {
    const answer = await fetch(path, options);
    if (stale?.()) throw new Stale();
    if (answer.status === 429) {
      await pause(1000 * Number(answer.headers.get("Retry-After") ?? 1));
      if (stale?.()) throw new Stale();
      continue;
    }
    const content = await answer.json().catch(() => ({}));
    if (answer.status !== 202) {
      if (answer.ok) return content;
      throw new Error(content.detail ?? `${answer.status} ${answer.statusText}`);
    }
    if (stale?.()) throw new Stale();
    status(`${content.kind}: ${content.stage || `${Math.round(100 * content.progress)} %`}`);
    await pause(300);
    if (stale?.()) throw new Stale();
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
