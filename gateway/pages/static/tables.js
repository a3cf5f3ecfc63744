// Numbers in words, and tables that are drawn again every two seconds without losing what is focused.
import { h } from "./nodes.js";

export const number = (value) => (value === null || value === undefined ? "–" : Number(value).toLocaleString("en"));
export const short = (value) => (value === null || value === undefined ? "–" : value >= 1e9 ? `${(value / 1e9).toFixed(1)} G` : value >= 1e6 ? `${(value / 1e6).toFixed(1)} M` : value >= 1e4 ? `${(value / 1e3).toFixed(0)} k` : number(Math.round(value)));
export const seconds = (value) => (value === null || value === undefined ? "–" : `${value < 10 ? value.toFixed(1) : short(value)} s`);
export const ms = (value) => (value === null || value === undefined ? "–" : value >= 10000 ? `${(value / 1000).toFixed(1)} s` : `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`);
export const some = (count, one, more = `${one}s`) => `${number(count)} ${count === 1 ? one : more}`;
export const when = (text) => (text ? new Date(text).toLocaleString("sv").slice(0, 19) : "–");

// With `isLive`, unchanged nodes are kept, with the handlers of an earlier row: these must use nothing of a row but its name.
export function table(node, columns, rows, empty, isLive = false) {
  const head = h("thead", {}, h("tr", {}, ...columns.map((column) => h("th", { class: column.number && "number", scope: "col" }, column.name))));
  const body = h("tbody", {}, ...rows.map((row) => h("tr", { "data-of": row.key_id || row.name || row.model }, ...columns.map((column) => h("td", { "data-label": column.name, class: [column.number && "number", column.wide && "wide"].filter(Boolean).join(" ") || null }, column.of(row))))));
  if (!rows.length) body.append(h("tr", {}, h("td", { colspan: columns.length, class: "dim" }, empty)));
  if (isLive) update(node, h("table", {}, head, body));
  else node.replaceChildren(head, body);
}

// Gives `node` the children of `made`. Unchanged ones are kept, with what is focused or pressed in them. A button with another
// text, or for another row (data-of), is replaced, as its handler differs.
export function update(node, made) {
  const fresh = [...made.childNodes], old = [...node.childNodes];
  fresh.forEach((one, n) => {
    const was = old[n];
    if (!was) node.append(one);
    else if (was.isEqualNode(one)) return;
    else if (was.nodeType === 1 && was.tagName === one.tagName && (was.tagName !== "BUTTON" || was.matches(".tile")) && was.dataset.of === one.dataset.of) {
      // What somebody has unfolded stays so.
      for (const name of new Set([...was.getAttributeNames(), ...one.getAttributeNames()])) {
        if (name !== "open") one.hasAttribute(name) ? was.setAttribute(name, one.getAttribute(name)) : was.removeAttribute(name);
      }
      update(was, one);
    } else was.replaceWith(one);
  });
  for (const gone of old.slice(fresh.length)) gone.remove();
}

export const link = (text, onClick, of) => h("button", { type: "button", class: "link", "data-of": of, on: { click: onClick } }, text);
export const button = (text, onClick, kind = "small", of) => h("button", { type: "button", class: kind, "data-of": of, on: { click: onClick } }, text);
