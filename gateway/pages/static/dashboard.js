import { $, copy, h, reach } from "./nodes.js";

const SVG = "http://www.w3.org/2000/svg";

function s(tag, facts, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(facts)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

const key = { get: () => sessionStorage.getItem("gateway-key") || "", set: (value) => sessionStorage.setItem("gateway-key", value), forget: () => sessionStorage.removeItem("gateway-key") };
let seen = null, chosen = "15m", listening = null, allKeys = [], lastAsked = 0, lastOpened = 0, isBehind = false;

class Refused extends Error {
  constructor(status, words) { super(words); this.status = status; }
}

async function refusalOf(answer) {
  let words = answer.statusText;
  try { words = (await answer.json()).error || words; } catch { /* no JSON: the status says it */ }
  const wait = answer.headers.get("retry-after");
  return new Refused(answer.status, `${answer.status}: ${words}${answer.status === 429 && wait ? ` (again in ${wait} s)` : ""}`);
}

async function ask(method, path, body) {
  const headers = { Authorization: `Bearer ${key.get()}` };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const answer = await reach(`/admin/v1${path}`, { method, headers, body: body === undefined ? undefined : JSON.stringify(body) });
  if (!answer.ok) throw await refusalOf(answer);
  return answer.json();
}

function say(problem) {
  // What goes wrong in a dialog is told there, in front.
  for (const place of [$("problem"), $("dialog").open && $("dialog-problem")].filter(Boolean)) {
    place.textContent = problem ? problem.message || String(problem) : "";
    place.hidden = !problem;
  }
  if (problem && (problem.status === 401 || (problem.status === 403 && !seen))) leave();
}

async function trying(work) {
  try { say(null); return await work(); } catch (problem) { say(problem); return undefined; }
}

const number = (value) => (value === null || value === undefined ? "–" : Number(value).toLocaleString("en"));
const short = (value) => (value === null || value === undefined ? "–" : value >= 1e9 ? `${(value / 1e9).toFixed(1)} G` : value >= 1e6 ? `${(value / 1e6).toFixed(1)} M` : value >= 1e4 ? `${(value / 1e3).toFixed(0)} k` : number(Math.round(value)));
const ms = (value) => (value === null || value === undefined ? "–" : value >= 10000 ? `${(value / 1000).toFixed(1)} s` : `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`);
const when = (text) => (text ? new Date(text).toLocaleString("sv").slice(0, 19) : "–");

// Where `isLive`, what stays as it was stays itself: its acts must need no more of a row than its name.
function table(node, columns, rows, empty, isLive = false) {
  const head = h("thead", {}, h("tr", {}, ...columns.map((column) => h("th", { class: column.number && "number", scope: "col" }, column.name))));
  const body = h("tbody", {}, ...rows.map((row) => h("tr", { "data-of": row.key_id || row.name || row.model }, ...columns.map((column) => h("td", { "data-label": column.name, class: [column.number && "number", column.wide && "wide"].filter(Boolean).join(" ") || null }, column.of(row))))));
  if (!rows.length) body.append(h("tr", {}, h("td", { colspan: columns.length, class: "dim" }, empty)));
  if (isLive) settle(node, h("table", {}, head, body));
  else node.replaceChildren(head, body);
}

// The children of `node` become those of `made`; what is as it was stays, with what is focused or pressed in it. A button is
// its act: with other words, or for somebody else (data-of), it is another.
function settle(node, made) {
  const fresh = [...made.childNodes], old = [...node.childNodes];
  fresh.forEach((one, n) => {
    const was = old[n];
    if (!was) node.append(one);
    else if (was.isEqualNode(one)) return;
    else if (was.nodeType === 1 && was.tagName === one.tagName && (was.tagName !== "BUTTON" || was.matches(".tile")) && was.dataset.of === one.dataset.of) {
      for (const name of ["class", "data-label", "colspan"]) one.hasAttribute(name) ? was.setAttribute(name, one.getAttribute(name)) : was.removeAttribute(name);
      settle(was, one);
    } else was.replaceWith(one);
  });
  for (const gone of old.slice(fresh.length)) gone.remove();
}

const link = (text, act, of) => h("button", { type: "button", class: "link", "data-of": of, on: { click: act } }, text);
const button = (text, act, kind = "small", of) => h("button", { type: "button", class: kind, "data-of": of, on: { click: act } }, text);

function show(tab) {
  for (const name of ["overview", "keys", "audit"]) $(name).hidden = name !== tab;
  for (const one of $("tabs").children) one.dataset.tab === tab ? one.setAttribute("aria-current", "page") : one.removeAttribute("aria-current");
  if (tab === "keys") trying(loadKeys);
  if (tab === "audit") trying(loadRows);
}

function rowsOf(filters) {
  for (const field of $("filter").elements) if (field.name) field.value = filters[field.name] || "";
  show("audit");
}

// ── overview ──

function tile(value, words, filters, kind) {
  const parts = [h("b", { class: kind }, value), h("span", {}, words)];
  return filters ? h("button", { type: "button", class: "tile", on: { click: () => rowsOf(filters) } }, ...parts) : h("div", { class: "tile" }, ...parts);
}

const MOST_LOADED = 5;
const loaded = (names) => (names.length > MOST_LOADED ? h("details", {}, h("summary", {}, `${names.slice(0, MOST_LOADED).join(", ")} and ${names.length - MOST_LOADED} more`), names.slice(MOST_LOADED).join(", ")) : names.join(", ") || "–");

function stateOfPostgres() {
  if (!seen.stores.postgresql) return ["away", "PostgreSQL", null, "bad"];
  return seen.postgresql_takes_writes === false ? ["read-only", "PostgreSQL", null, "warn"] : ["up", "PostgreSQL", null, "good"];
}

function drawOverview() {
  const lately = seen.lately || {}, since = { since: "15m" };
  settle($("tiles"), h("div", {},
    tile(number(seen.in_flight), "under way"),
    tile(number(seen.waiting), "waiting for a slot", null, seen.waiting ? "warn" : null),
    tile(number(lately.requests), "requests, 15 min", since),
    tile(number(lately.failures), "failed at backends", { ...since, outcome: "backend_failed" }, lately.failures ? "bad" : null),
    tile(number(lately.refused), "refused", { ...since, outcome: "refused" }, lately.refused ? "warn" : null),
    tile(`${short(lately.prompt_tokens)} + ${short(lately.completion_tokens)}`, `tokens in + out${lately.cached_tokens ? `; ${short(lately.cached_tokens)} cached` : ""}`, since),
    tile(`${ms(lately.ttfb_p50_ms)}`, `first byte p50; p99 ${ms(lately.ttfb_p99_ms)}`, since),
    tile(seen.stores.redis ? "up" : "away", "Redis", null, seen.stores.redis ? "good" : "bad"),
    tile(...stateOfPostgres()),
    tile(number(seen.audit_backlog), "audit rows waiting", null, seen.audit_backlog > 10000 ? "warn" : null),
    tile(number(seen.processes), "processes"),
  ));
  table($("backends"), [
    { name: "Backend", of: (row) => row.name },
    { name: "State", of: (row) => h("span", { class: row.drained ? "warn" : row.state === "up" ? "good" : "bad" }, row.drained ? "drained" : row.state) },
    { name: "Breaker", of: (row) => h("span", { class: row.breaker === "closed" ? null : "bad" }, row.breaker + (row.open_for_s ? ` ${Math.ceil(row.open_for_s)} s` : "")) },
    { name: "In flight", number: true, of: (row) => `${row.in_flight}/${row.max_connections}` },
    { name: "Latency", number: true, of: (row) => ms(row.latency_ms) },
    { name: "Models", number: true, of: (row) => number(row.models) },
    { name: "Loaded", wide: true, of: (row) => loaded(row.running) },
    { name: "Last error", wide: true, of: (row) => h("span", { class: "bad" }, row.error) },
    { name: "", of: (row) => h("div", { class: "actions" },
      row.drained ? button("Undrain", () => act(`Give ${row.name} requests again?`, "Undrain", "POST", `/backends/${encodeURIComponent(row.name)}/undrain`), "small", row.name)
        : button("Drain", () => act(`Give ${row.name} no new requests? Those under way finish.`, "Drain", "POST", `/backends/${encodeURIComponent(row.name)}/drain`), "small", row.name),
      button("Probe", () => telling(`Probe of ${row.name}`, () => ask("POST", `/backends/${encodeURIComponent(row.name)}/probe`)), "small", row.name)) },
  ], seen.backends, "no backends", true);
  table($("busy-keys"), [
    { name: "Key", wide: true, of: (row) => link(row.key || row.key_id, () => rowsOf({ key: row.key_id, since: "15m" }), row.key_id) },
    { name: "Requests", number: true, of: (row) => number(row.requests) },
    { name: "Tokens", number: true, of: (row) => short(row.tokens) },
    { name: "At a limit", number: true, of: (row) => (row.limited ? link(`${row.limited} (${row.limit || "?"})`, () => rowsOf({ key: row.key_id, since: "15m", status: "429" }), row.key_id) : "–") },
  ], lately.keys || [], seen.lately ? "nobody in the last 15 minutes" : "PostgreSQL does not tell", true);
  table($("busy-models"), [
    { name: "Model", wide: true, of: (row) => link(row.model, () => rowsOf({ model: row.model, since: "15m" })) },
    { name: "Requests", number: true, of: (row) => number(row.requests) },
    { name: "Tokens", number: true, of: (row) => short(row.tokens) },
    { name: "First byte p50", number: true, of: (row) => ms(row.ttfb_p50_ms) },
  ], lately.models || [], seen.lately ? "none in the last 15 minutes" : "PostgreSQL does not tell", true);
}

const LENGTHS = { "15m": 900, "24h": 86400, "30d": 2592000 };
const NOTHING = { requests: 0, refused: 0, failures: 0, prompt_tokens: 0, completion_tokens: 0, ttfb_p50_ms: null, ttfb_p99_ms: null };

// With the steps in which nothing was asked for, which are not told.
function whole(series, from, to) {
  const told = new Map(series.steps.map((step) => [Math.round(step.at / series.step_s), step])), all = [];
  for (let n = Math.ceil(from / series.step_s); n * series.step_s <= to; n += 1) all.push(told.get(n) || { ...NOTHING, at: n * series.step_s });
  return all;
}

function runs(values, isThere) {
  const found = [];
  let run = null;
  for (const value of values) {
    if (!isThere(value)) { run = null; continue; }
    if (!run) found.push(run = []);
    run.push(value);
  }
  return found;
}

function spoken(lines, steps, format) {
  return lines.map((line) => {
    const values = steps.map((step) => line.of(step)).filter((value) => value !== null && value !== undefined);
    return values.length ? `${line.name} at most ${format(Math.max(...values))}, last ${format(values.at(-1))}` : `${line.name} unknown`;
  }).join("; ");
}

function plot(title, lines, series, format) {
  const width = 400, height = 130, bottom = 18, top = 8, from = new Date(series.since) / 1000, to = from + LENGTHS[series.window], steps = whole(series, from, to);
  const most = Math.max(1e-9, ...steps.flatMap((step) => lines.map((line) => line.of(step) || 0)));
  const left = Math.max(44, 12 + 7 * Math.max(...[0, 0.5, 1].map((share) => format(most * share).length)));
  const x = (at) => left + ((at - from) / (to - from)) * (width - left - 4), y = (value) => height - bottom - (value / most) * (height - bottom - top);
  const svg = s("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}: ${spoken(lines, steps, format)}`, preserveAspectRatio: "none" });
  for (const share of [0, 0.5, 1]) {
    svg.append(s("line", { class: "grid", x1: left, x2: width, y1: y(most * share), y2: y(most * share) }), s("text", { x: left - 4, y: y(most * share) + 4, "text-anchor": "end" }, steps.length ? format(most * share) : ""));
  }
  for (const [at, anchor] of [[from, "start"], [to, "end"]]) svg.append(s("text", { x: x(at), y: height - 4, "text-anchor": anchor }, new Date(at * 1000).toLocaleString("sv").slice(series.window === "30d" ? 5 : 11, 16)));
  for (const line of lines) {
    const values = steps.map((step) => [step.at, line.of(step)]), isThere = ([, value]) => value !== null && value !== undefined;
    // A line stops where nothing was measured.
    for (const run of runs(values, isThere)) svg.append(s("polyline", { class: line.kind, points: run.map(([at, value]) => `${x(at)},${y(value)}`).join(" ") }));
    for (const [at, value] of values.filter(isThere)) if (value > 0) svg.append(s("circle", { class: line.kind, cx: x(at), cy: y(value), r: values.length > 60 ? 1 : 2 }));
  }
  const legend = h("div", { class: "legend" }, ...lines.map((line) => h("span", {}, h("i", { class: line.kind }), line.name)));
  return h("div", { class: "plot" }, h("h3", {}, title), svg, legend);
}

async function drawPlots() {
  const wanted = chosen, series = await ask("GET", `/series?window=${wanted}`), rate = series.step_s / 60;
  if (wanted !== chosen || !seen) return;
  $("plots").replaceChildren(
    plot("Requests a minute", [{ name: "all", kind: "one", of: (step) => step.requests / rate }, { name: "refused", kind: "two-line", of: (step) => step.refused / rate }, { name: "failed", kind: "three", of: (step) => step.failures / rate }], series, short),
    plot("Tokens a minute", [{ name: "in", kind: "one", of: (step) => step.prompt_tokens / rate }, { name: "out", kind: "two-line", of: (step) => step.completion_tokens / rate }], series, short),
    plot("Time to the first byte", [{ name: "p50", kind: "one", of: (step) => step.ttfb_p50_ms }, { name: "p99", kind: "two-line", of: (step) => step.ttfb_p99_ms }], series, ms),
  );
}

// ── dialogs ──

function open(title, content, buttons) {
  const dialog = $("dialog");
  $("dialog-form").replaceChildren(h("h2", { id: "dialog-title" }, title), ...content, h("p", { id: "dialog-problem", class: "bad", role: "alert", hidden: true }), h("div", { class: "buttons" }, ...buttons));
  if (!dialog.open) dialog.showModal();
  return (lastOpened += 1);
}

const close = (text = "Close") => h("button", { type: "button", on: { click: () => $("dialog").close() } }, text);

// What Enter in a field does too; pressed twice it acts once.
function saving(word, work) {
  const save = h("button", { type: "submit", id: "save", on: { click: async (event) => {
    event.preventDefault();
    save.disabled = true;
    await trying(work);
    save.disabled = false;
  } } }, word);
  return save;
}

// An answer is told in the dialog that was opened for it, and in no other that stands there by then.
async function telling(title, work) {
  say(null);
  const mine = open(title, [h("p", { class: "dim" }, "asking…")], [close()]), isMine = () => mine === lastOpened && $("dialog").open;
  try {
    const facts = await work();
    if (isMine()) open(title, [h("pre", {}, JSON.stringify(facts, null, 2))], [close()]);
  } catch (problem) {
    if (isMine()) open(title, [], [close()]);
    say(problem);
  }
}

function confirmed(question, word, work) {
  open(question, [], [close("Cancel"), h("button", { type: "button", class: "danger", id: "confirm", on: { click: (event) => { event.target.disabled = true; $("dialog").close(); trying(work); } } }, word)]);
}

function act(question, word, method, path, body) {
  confirmed(question, word, async () => { await ask(method, path, body); await look(); });
}

// A hasty Escape must not take what is shown this once.
let isKept = true;
$("dialog").addEventListener("cancel", (event) => {
  if (!$("new-key") || isKept) return;
  event.preventDefault();
  isKept = true;
  say(new Error("This key is not copied yet; once closed it cannot be shown again."));
});
$("dialog").addEventListener("close", () => { if (!$("dialog").open) $("dialog-form").replaceChildren(); });

function shownOnce(made) {
  open("The key, shown this once", [h("p", {}, "It is stored nowhere: copy it now."), h("pre", { id: "new-key" }, made.key)], [button("Copy", (event) => { isKept = true; copy(event.target, made.key); }, ""), close()]);
  isKept = false;
}

const field = (name, words, facts = {}) => h("label", {}, words, h("input", { name, ...facts }));
const LIMITS = [["rpm", "Requests a minute"], ["tpm", "Tokens a minute"], ["concurrent", "At once"], ["day", "Tokens a day"], ["month", "Tokens a month"]];

function limitsIn(form) {
  const found = {};
  for (const [name] of LIMITS) {
    const text = form.elements[name].value.trim();
    if (text) found[name] = text === "unlimited" ? text : text === "default" ? null : /^\d+$/.test(text) ? Number(text) : text;
  }
  return found;
}

function makeKey() {
  const save = saving("Make", async () => {
    const form = $("dialog-form"), body = { name: form.elements.name.value.trim(), models: form.elements.models.value.split(/\s+/).filter(Boolean), role: form.elements.role.value, ...limitsIn(form) };
    if (form.elements.expires.value.trim()) body.expires = form.elements.expires.value.trim();
    const made = await ask("POST", "/keys", body);
    shownOnce(made);
    await loadKeys();
  });
  open("Make a key", [h("div", { class: "fields" }, field("name", "Name", { required: true }), field("models", "Models (none: all)", { placeholder: "llama3* qwen3" }), field("expires", "Ends after", { placeholder: "30d" }),
    h("label", {}, "Role", h("select", { name: "role" }, h("option", { value: "user" }, "user"), h("option", { value: "admin" }, "admin"))),
    ...LIMITS.map(([name, words]) => field(name, words, { placeholder: "default" })))], [close("Cancel"), save]);
}

function limitKey(row) {
  const save = saving("Set", () => confirmedLimits(row));
  open(`Limits of ${row.name}`, [h("p", { class: "dim" }, "A number, “unlimited”, or “default”; what is left empty stays."),
    h("div", { class: "fields" }, ...LIMITS.map(([name, words]) => field(name, words, { placeholder: row[name] === null ? "default" : String(row[name]) })))], [close("Cancel"), save]);
}

function confirmedLimits(row) {
  const wished = limitsIn($("dialog-form")), words = Object.entries(wished).map(([name, value]) => `${name} ${value === null ? "default" : value}`).join(", ");
  if (!words) { $("dialog").close(); return; }
  confirmed(`Set ${words} for ${row.name}?`, "Set", async () => { await ask("PATCH", `/keys/${encodeURIComponent(row.id)}`, wished); await loadKeys(); });
}

// ── keys ──

async function loadKeys() {
  allKeys = await ask("GET", "/keys");
  drawKeys();
}

function drawKeys() {
  const wanted = $("find-key").value.trim().toLowerCase();
  const found = allKeys.filter((row) => !wanted || row.name.toLowerCase().includes(wanted) || row.id.includes(wanted)), shown = found.slice(0, 200);
  const limits = (row) => LIMITS.filter(([name]) => row[name] !== null).map(([name]) => `${name} ${number(row[name]) === "NaN" ? row[name] : number(row[name])}`).concat(row.rules).join("; ") || "default";
  table($("all-keys"), [
    { name: "Name", wide: true, of: (row) => link(row.name, () => rowsOf({ key: row.id })) },
    { name: "Id", of: (row) => h("code", {}, row.id) },
    { name: "State", of: (row) => h("span", { class: row.state === "active" ? "good" : "dim" }, row.state + (row.flags.includes("admin") ? ", admin" : "")) },
    { name: "Models", wide: true, of: (row) => row.models.join(" ") },
    { name: "Limits", wide: true, of: limits },
    { name: "Last used", of: (row) => when(row.last_used_at) },
    { name: "", of: (row) => row.state === "active" && h("div", { class: "actions" },
      button("Limits", () => limitKey(row)),
      button("Rotate", () => confirmed(`Give ${row.name} a new secret? The old one works for 24 hours more.`, "Rotate", async () => { shownOnce(await ask("POST", `/keys/${encodeURIComponent(row.id)}/rotate`, { overlap: "24h" })); await loadKeys(); })),
      button("Revoke", () => confirmed(`End ${row.name}, everywhere at once? This cannot be taken back.`, "Revoke", async () => { await ask("DELETE", `/keys/${encodeURIComponent(row.id)}`); await loadKeys(); }), "small danger")) || "" },
  ], shown, "no such key");
  $("keys-shown").textContent = `${number(shown.length)} of ${number(found.length)} keys${found.length > shown.length ? ": find the others by name or id" : ""}`;
}

// ── audit ──

async function loadRows() {
  const asked = new URLSearchParams();
  for (const item of $("filter").elements) if (item.name && item.value.trim()) asked.set(item.name, item.value.trim());
  const mine = (lastAsked += 1), rows = await ask("GET", `/audit?${asked}`);
  if (mine !== lastAsked || !seen) return;
  table($("rows"), [
    { name: "Time", of: (row) => link(when(row.at), () => telling(`Request ${row.request_id}`, () => ask("GET", `/requests/${encodeURIComponent(row.id)}`)), row.id) },
    { name: "Key", wide: true, of: (row) => row.key || row.key_id },
    { name: "Model", wide: true, of: (row) => row.model || "–" },
    { name: "Backend", of: (row) => row.backend || "–" },
    { name: "Status", number: true, of: (row) => h("span", { class: row.status >= 500 ? "bad" : row.status >= 400 ? "warn" : null }, row.status || "–") },
    { name: "Outcome", wide: true, of: (row) => row.outcome + (row.detail ? ` (${row.detail})` : "") },
    { name: "Tokens", number: true, of: (row) => `${row.prompt_tokens}${row.cached_tokens ? ` (${row.cached_tokens} cached)` : ""} + ${row.completion_tokens}` },
    { name: "First byte", number: true, of: (row) => ms(row.ttfb_ms) },
    { name: "Total", number: true, of: (row) => ms(row.total_ms) },
  ], rows, "no such request");
  $("rows-shown").textContent = rows.length ? `the newest ${number(rows.length)}` : "";
}

// ── live ──

// It tells every two seconds: silence says that it stands still, or that the way to it does.
const SILENCE_MS = 8000, LONGEST_PAUSE_MS = 30000;

async function within(ms, reader) {
  let timer;
  const late = new Promise((_, failed) => { timer = setTimeout(() => { reader.cancel().catch(() => {}); failed(new Error("silence")); }, ms); });
  try { return await Promise.race([reader.read(), late]); } finally { clearTimeout(timer); }
}

async function listen(signal) {
  const answer = await reach("/admin/v1/events", { headers: { Authorization: `Bearer ${key.get()}` }, signal });
  if (!answer.ok) throw await refusalOf(answer);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { done, value } = await within(SILENCE_MS, reader);
    if (done) return;
    rest += value;
    for (let end; (end = rest.indexOf("\n\n")) >= 0; rest = rest.slice(end + 2)) {
      seen = JSON.parse(rest.slice(6, end));
      live("live", "good");
      if (isBehind) { isBehind = false; say(null); }
      drawOverview();
    }
  }
}

function live(words, kind) {
  if ($("live").textContent === `● ${words}`) return;
  $("live").textContent = `● ${words}`;
  $("live").className = kind;
}

async function keepListening(signal) {
  for (let pause = 1000; !signal.aborted; pause = Math.min(2 * pause, LONGEST_PAUSE_MS)) {
    try {
      const before = seen;
      await listen(signal);
      if (seen !== before) pause = 1000;
    } catch (problem) {
      if (signal.aborted) return;
      if (problem instanceof Refused) { isBehind = true; say(problem); }
      if (problem.status === 401 || problem.status === 403) { live("stopped", "bad"); return; }
    }
    live("not connected, trying again", "bad");
    await new Promise((done) => setTimeout(done, pause));
  }
}

async function look() {
  seen = await ask("GET", "/overview");
  drawOverview();
}

function enter() {
  $("enter").hidden = true;
  for (const id of ["tabs", "leave"]) $(id).hidden = false;
  show("overview");
  listening = new AbortController();
  keepListening(listening.signal);
  trying(drawPlots);
}

function leave() {
  key.forget();
  seen = null;
  allKeys = [];
  listening?.abort();
  $("dialog").close();
  for (const id of ["tiles", "plots", "backends", "busy-keys", "busy-models", "all-keys", "rows", "dialog-form"]) $(id).replaceChildren();
  for (const id of ["keys-shown", "rows-shown"]) $(id).textContent = "";
  $("filter").reset();
  $("find-key").value = "";
  for (const id of ["tabs", "leave", "overview", "keys", "audit"]) $(id).hidden = true;
  $("live").textContent = "";
  $("enter").hidden = false;
  $("key").value = "";
  $("key").focus();
}

$("enter").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set($("key").value.trim());
  trying(async () => { await look(); enter(); });
});
$("leave").addEventListener("click", leave);
$("tabs").addEventListener("click", (event) => event.target.dataset.tab && show(event.target.dataset.tab));
$("windows").addEventListener("click", (event) => {
  if (!event.target.dataset.window) return;
  chosen = event.target.dataset.window;
  for (const one of $("windows").children) one.setAttribute("aria-pressed", one.dataset.window === chosen);
  trying(drawPlots);
});
$("refresh").addEventListener("click", () => telling("Models", async () => { const told = await ask("POST", "/refresh"); await look(); return told; }));
$("find-key").addEventListener("input", drawKeys);
$("make-key").addEventListener("click", makeKey);
$("filter").addEventListener("submit", (event) => { event.preventDefault(); trying(loadRows); });
setInterval(() => { if (seen && !$("overview").hidden) drawPlots().catch(() => {}); }, 15000);
if (key.get()) trying(async () => { await look(); enter(); });
