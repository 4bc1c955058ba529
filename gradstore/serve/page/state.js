// The state of the page is its address, so that every view can be sent to somebody.

const defaults = {
  view: "ask", run: "", step: "", checkpoints: "last", target: "", row: "",
  sort: "-score", min: "", max: "", source: "", contains: "",
  colour: "source", lasso: "", prompt: "", response: "",
  before: "", after: "", beforeTarget: "", afterTarget: "", beforeCount: "", afterCount: "",
};

const listeners = [];

export function read() {
  const query = new URLSearchParams(location.search);
  const state = {};
  for (const name in defaults) state[name] = query.get(name) ?? defaults[name];
  return state;
}

export function address(changes) {
  const query = new URLSearchParams();
  const state = { ...read(), ...changes };
  for (const name in defaults) {
    if (String(state[name]) !== defaults[name]) query.set(name, state[name]);
  }
  const text = query.toString();
  return text ? `/?${text}` : "/";
}

// Change the address and draw again. `quietly` keeps the step out of the browser's history.
export function change(changes, quietly = false) {
  const to = address(changes);
  if (to === location.pathname + location.search) return;
  history[quietly ? "replaceState" : "pushState"](null, "", to);
  announce();
}

export function announce() {
  for (const listener of listeners) listener(read());
}

export function listen(listener) {
  listeners.push(listener);
}

addEventListener("popstate", announce);
