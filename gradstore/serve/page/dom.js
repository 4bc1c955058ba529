// Elements. Text of rows only ever becomes text nodes: markup in it is shown, never read.

export const by = (id) => document.getElementById(id);

export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

// Control characters as their pictures, marks of direction and hidden ones as their code.
export function visible(text) {
  return text
    .replace(/[\u0000-\u0008\u000b-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)))
    .replace(HIDDEN, (c) => {
      const code = c.codePointAt(0).toString(16);
      return code.length > 4 ? `\\u{${code}}` : `\\u${code.padStart(4, "0")}`;
    });
}

// As `printable` of gradstore's names: control, format, separators of lines, halves of pairs.
const HIDDEN = /[\u007f-\u009f\p{Cf}\p{Zl}\p{Zp}\p{Cs}]/gu;

export const number = (value) => value.toLocaleString("en");
export const signed = (value) => (value === null ? "–" : (value < 0 ? "−" : "+") + Math.abs(value).toFixed(4));
export const place = (line) => (line.source ? `${line.source[0]}[${line.source[1]}]` : `row ${line.row}`);

const WORD = /[\p{L}\p{N}]+/gu;

export function wordsOf(text) {
  const found = (text.toLowerCase().match(WORD) ?? []).filter((w) => w.length > 2 || /\d/.test(w));
  return new Set(found);
}

// The text as nodes, words of `words` in <mark>.
export function marked(text, words) {
  const nodes = [];
  let done = 0;
  for (const match of text.matchAll(WORD)) {
    if (!words.has(match[0].toLowerCase())) continue;
    nodes.push(text.slice(done, match.index), el("mark", {}, match[0]));
    done = match.index + match[0].length;
  }
  return [...nodes, text.slice(done)];
}

// Prompt and response of a row; what a cut left out is said.
export function texts(line, words = new Set(), without = "") {
  if (line.prompt === null) return [el("p", { class: "note" }, `No text in this store: ${without}.`)];
  const parts = ["prompt", "response"].map((name) =>
    el("p", { class: `text ${name}` }, ...marked(visible(line[name]), words)));
  const cut = Math.max(line.prompt_length - line.prompt.length, line.response_length - line.response.length);
  if (cut > 0) {
    const whole = number(line.prompt_length + line.response_length);
    parts.push(el("p", { class: "note" }, `cut; ${whole} characters in all, "Whole row" shows them`));
  }
  return parts;
}

export function card(line, rank, words, open, without) {
  return el("article", { "data-row": line.row },
    el("header", {}, el("span", {}, `${rank}.`), el("b", {}, signed(line.score)),
      el("span", {}, visible(place(line))), el("span", {}, `${line.tokens} tokens`),
      el("button", { type: "button", onclick: () => open(line.row) }, "Whole row")),
    ...texts(line, words, without));
}

export function options(select, entries, chosen) {
  select.replaceChildren(...entries.map(([value, text]) => el("option", { value }, text)));
  select.value = chosen;
  if (select.selectedIndex < 0 && entries.length) select.selectedIndex = 0;
}
