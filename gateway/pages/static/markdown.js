// Markdown as models write it. The time is linear in the length of the text, and nesting is bounded: no answer of a model may
// block the page. Images are not loaded, and links lead to the web only.
import { h } from "./nodes.js";

const DEEPEST = 6, LONGEST_ADDRESS = 2000;
const PUNCTUATION = /[!-/:-@[-`{-~]/, WORD = /[\p{L}\p{N}_]/u;
const ITEM = /^([ \t]*)([-*+]|\d{1,9}[.)])(?:[ \t]+|$)/, FENCE = /^[ \t]*(`{3,}(?!`)|~{3,}(?!~))([^`]*)$/, HEADING = /^ {0,3}(#{1,6})[ \t]+/;
const RULE = /^ {0,3}([-*_])[ \t]*\1[ \t]*\1[ \t]*(?:\1[ \t]*)*$/, QUOTE = /^[ \t]*>[ \t]?/, BLANK = /^[ \t]*$/;
const MARKS = [["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"]];

// ── words in a line ──

// For a mark the next position that can end it. Positions are asked for in rising order, so that none is scanned twice.
function ends(text, mark, fits) {
  let at = -1;
  return (from) => {
    while (at !== text.length && (at < from || !fits(at))) {
      at = text.indexOf(mark, Math.max(from, at + 1));
      if (at < 0) at = text.length;
    }
    return at === text.length ? -1 : at;
  };
}

function closesMark(text, mark) {
  const isWhole = (at) => text[at + mark.length] !== mark[0] && (mark.length === 2 || text[at - 1] !== mark);
  const stands = (at) => at > 0 && !/\s/.test(text[at - 1]) && isWhole(at);
  return mark[0] === "_" ? (at) => stands(at) && !WORD.test(text[at + mark.length] || " ") : stands;
}

function opensMark(text, at, mark) {
  // Three are two and one: `***both***`.
  const next = text[at + mark.length] === mark[0] && mark.length === 2 ? text[at + 3] : text[at + mark.length];
  return next !== undefined && !/\s/.test(next) && next !== mark[0] && (mark[0] !== "_" || !WORD.test(text[at - 1] || " "));
}

function codeSpans(text) {
  const places = new Map();
  for (const run of text.matchAll(/`+/g)) places.get(run[0].length)?.push(run.index) ?? places.set(run[0].length, [run.index]);
  const next = new Map();
  return (from, length) => {
    const all = places.get(length);
    let at = next.get(length) || 0;
    while (at < all.length && all[at] < from) at += 1;
    next.set(length, at);
    return all[at] ?? -1;
  };
}

// The end of a URL that begins there, with balanced brackets; -1 if there is none.
function addressEnd(text, from) {
  for (let at = from, open = 0; at < text.length && at - from < LONGEST_ADDRESS; at += 1) {
    if (/\s/.test(text[at]) || text.startsWith("](", at)) return -1;
    if (text[at] === "(") open += 1;
    else if (text[at] === ")" && (open -= 1) < 0) return at;
  }
  return -1;
}

function linkAt(text, at, close, lastBracket) {
  const end = close(at + 1), inner = text.indexOf("[", at + 1);
  if (end < 0 || (inner >= 0 && inner < end) || end > lastBracket || end === at + 1) return null;
  const address = /^https?:\/\//i.test(text.slice(end + 2, end + 10)) ? addressEnd(text, end + 2) : -1;
  return address < 0 ? null : { words: text.slice(at + 1, end), address: text.slice(end + 2, address), end: address + 1 };
}

function inline(text, depth = 0, inLink = false) {
  const into = document.createDocumentFragment(), tickEnd = codeSpans(text), linkEnd = ends(text, "](", () => true);
  const marks = MARKS.map(([mark, tag]) => ({ mark, tag, end: ends(text, mark, closesMark(text, mark)) }));
  const lastBracket = text.lastIndexOf(")");
  let plain = "", at = 0;
  const add = (node, to) => { if (plain) lines(into, plain); plain = ""; into.append(node); at = to; };
  while (at < text.length) {
    const one = text[at];
    if (one === "\\" && PUNCTUATION.test(text[at + 1] || "")) { plain += text[at + 1]; at += 2; continue; }
    if (one === "`") {
      let length = 1;
      while (text[at + length] === "`") length += 1;
      const end = tickEnd(at + length, length);
      if (end >= 0) add(h("code", {}, unpadded(text.slice(at + length, end))), end + length);
      else { plain += text.slice(at, at + length); at += length; }
      continue;
    }
    if (one === "[" && !inLink) {
      const link = linkAt(text, at, linkEnd, lastBracket);
      if (link) {
        if (plain.endsWith("!")) plain = plain.slice(0, -1);
        add(h("a", { href: link.address, rel: "noopener noreferrer", target: "_blank" }, inline(link.words, depth + 1, true)), link.end);
        continue;
      }
    }
    const found = "*_~".includes(one) && depth < DEEPEST && marks.find(({ mark }) => text.startsWith(mark, at) && opensMark(text, at, mark));
    const end = found ? found.end(at + found.mark.length + 1) : -1;
    if (end >= 0) add(h(found.tag, {}, inline(text.slice(at + found.mark.length, end), depth + 1, inLink)), end + found.mark.length);
    else { const length = found ? found.mark.length : 1; plain += text.slice(at, at + length); at += length; }
  }
  if (plain) lines(into, plain);
  return into;
}

// A space on each side only separates backticks.
function unpadded(code) { return code.startsWith(" ") && code.endsWith(" ") && code.trim() ? code.slice(1, -1) : code; }

function lines(into, text) {
  text.split("\n").forEach((words, at) => into.append(...(at ? [h("br"), words] : [words])));
}

// ── blocks ──

// A row's cells; `\|` is not a border.
function cells(line) {
  const found = [];
  let cell = "";
  const inner = line.trim().replace(/^\|/, "");
  for (let at = 0; at < inner.length; at += 1) {
    if (inner[at] === "\\" && inner[at + 1] === "|") { cell += "|"; at += 1; }
    else if (inner[at] === "|") { found.push(cell.trim()); cell = ""; }
    else cell += inner[at];
  }
  return cell.trim() ? [...found, cell.trim()] : found;
}

function isTable(lines, n) {
  const below = lines[n + 1];
  if (!lines[n].includes("|") || below === undefined || !below.includes("-") || /[^-:| \t]/.test(below)) return false;
  const borders = cells(below);
  return borders.length === cells(lines[n]).length && borders.every((cell) => /^:?-+:?$/.test(cell));
}

const begins = (line) => FENCE.test(line) || HEADING.test(line) || QUOTE.test(line) || ITEM.test(line) || RULE.test(line);
const indent = (line) => line.length - line.trimStart().length;

// Cuts lines into blocks: [kind, first line, line after the last].
function* blocks(lines) {
  for (let n = 0, from; n < lines.length; ) {
    const line = lines[from = n], fence = FENCE.exec(line);
    if (BLANK.test(line)) { n += 1; continue; }
    if (fence) {
      const closes = (text) => text.startsWith(fence[1]) && text === fence[1][0].repeat(text.length);
      for (n += 1; n < lines.length && !closes(lines[n].trim()); n += 1);
      n = Math.min(lines.length, n + 1);
      yield ["code", from, n];
    } else if (HEADING.test(line)) yield ["heading", from, n += 1];
    else if (RULE.test(line)) yield ["rule", from, n += 1];
    else if (QUOTE.test(line)) {
      for (; n < lines.length && QUOTE.test(lines[n]); n += 1);
      yield ["quote", from, n];
    } else if (ITEM.test(line)) yield ["list", from, n = listEnd(lines, n)];
    else if (isTable(lines, n)) {
      for (n += 2; n < lines.length && lines[n].includes("|") && !begins(lines[n]); n += 1);
      yield ["table", from, n];
    } else {
      for (n += 1; n < lines.length && !BLANK.test(lines[n]) && !begins(lines[n]) && !isTable(lines, n); n += 1);
      yield ["text", from, n];
    }
  }
}

const kindOf = (mark) => (/\d/.test(mark) ? mark.at(-1) : mark);

function listEnd(lines, n) {
  const [, margin, mark] = ITEM.exec(lines[n]), inner = margin.length + 2;
  for (n += 1; n < lines.length; n += 1) {
    const line = lines[n], item = ITEM.exec(line);
    if (BLANK.test(line)) {
      let next = n + 1;
      while (next < lines.length && BLANK.test(lines[next])) next += 1;
      const goesOn = next < lines.length && (indent(lines[next]) >= inner || sameList(ITEM.exec(lines[next]), margin, mark));
      if (!goesOn) return n;
      n = next - 1;
    } else if (indent(line) < inner && (item ? !sameList(item, margin, mark) : begins(line))) return n;
  }
  return n;
}

const sameList = (item, margin, mark) => item !== null && item[1].length < margin.length + 2 && kindOf(item[2]) === kindOf(mark);

function list(lines, depth) {
  const [, margin, mark] = ITEM.exec(lines[0]), isOrdered = /\d/.test(mark), items = [];
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length < margin.length + 2) items.push({ width: item[0].length, lines: [line.slice(item[0].length)] });
    else {
      const { width, lines: own } = items.at(-1);
      own.push(line.slice(Math.min(indent(line), width)));
    }
  }
  const made = h(isOrdered ? "ol" : "ul", isOrdered ? { start: parseInt(mark, 10) } : {});
  for (const item of items) made.append(h("li", {}, ofItem(item.lines, depth)));
  return made;
}

function ofItem(lines, depth) {
  const all = [...blocks(lines)];
  return all.map(([kind, from, to], n) => (kind === "text" && n === 0 ? inline(lines.slice(from, to).join("\n")) : block(kind, lines.slice(from, to), depth + 1)));
}

function table([head, , ...rows]) {
  const names = cells(head);
  const row = (line) => { const found = cells(line); return h("tr", {}, names.map((name, n) => h("td", { "data-label": name }, inline(found[n] || "")))); };
  const above = h("thead", {}, h("tr", {}, names.map((name) => h("th", {}, inline(name)))));
  return h("div", { class: "scroll" }, h("table", {}, above, h("tbody", {}, rows.map(row))));
}

// The text between the fences, without the indentation of the first.
function codeOf(lines) {
  const margin = indent(lines[0]), isClosed = lines.length > 1 && /^[ \t]*(`{3,}|~{3,})[ \t]*$/.test(lines.at(-1));
  return lines.slice(1, isClosed ? -1 : undefined).map((line) => line.slice(Math.min(indent(line), margin))).join("\n");
}

function block(kind, lines, depth) {
  if (depth >= DEEPEST) return h("p", {}, inline(lines.join("\n"), DEEPEST));
  switch (kind) {
    case "code": return h("pre", { tabindex: "0" }, h("code", {}, codeOf(lines)));
    case "heading": return h(`h${Math.min(6, HEADING.exec(lines[0])[1].length + 2)}`, {}, inline(lines[0].replace(HEADING, "")));
    case "rule": return h("hr");
    case "quote": { const own = lines.map((line) => line.replace(QUOTE, "")); return h("blockquote", {}, [...blocks(own)].map(([inner, from, to]) => block(inner, own.slice(from, to), depth + 1))); }
    case "list": return list(lines, depth);
    case "table": return table(lines);
    default: return h("p", {}, inline(lines.join("\n").trim()));
  }
}

// Shows a growing text: only blocks that changed are rebuilt, so that selection, focus and scrolling above are kept.
export class StreamingMarkdown {
  constructor(node) { this.node = node; this.shown = []; }

  show(text) {
    const lines = text.split(/\r?\n/), now = [...blocks(lines)].map(([kind, from, to]) => ({ kind, lines: lines.slice(from, to) }));
    now.forEach((one, n) => {
      const before = this.shown[n];
      one.source = one.lines.join("\n");
      if (before?.kind === one.kind && before.source === one.source) { one.node = before.node; return; }
      if (before?.kind === "code" && one.kind === "code") { this.grow(before.node, codeOf(one.lines)); one.node = before.node; return; }
      one.node = block(one.kind, one.lines, 0);
      if (before) before.node.replaceWith(one.node); else this.node.append(one.node);
    });
    for (const gone of this.shown.slice(now.length)) gone.node.remove();
    this.shown = now;
  }

  grow(pre, text) {
    const words = pre.firstChild.firstChild;
    if (words && text.startsWith(words.data)) words.appendData(text.slice(words.data.length));
    else pre.firstChild.textContent = text;
  }
}
