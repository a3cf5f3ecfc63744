import { $, copy, h } from "./nodes.js";

const SVG = "http://www.w3.org/2000/svg";

function s(tag, facts, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(facts)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

const key = { get: () => sessionStorage.getItem("gateway-key") || "", set: (value) => sessionStorage.setItem("gateway-key", value), forget: () => sessionStorage.removeItem("gateway-key") };
let seen = null, chosen = "15m", listening = null, allKeys = [];

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
  const answer = await fetch(`/admin/v1${path}`, { method, headers, body: body === undefined ? undefined : JSON.stringify(body) });
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

function table(node, columns, rows, empty) {
  const head = h("thead", {}, h("tr", {}, ...columns.map((column) => h("th", { class: column.number && "number", scope: "col" }, column.name))));
  const body = h("tbody", {}, ...rows.map((row) => h("tr", {}, ...columns.map((column) => h("td", { "data-label": column.name, class: [column.number && "number", column.wide && "wide"].filter(Boolean).join(" ") || null }, column.of(row))))));
  if (!rows.length) body.append(h("tr", {}, h("td", { colspan: columns.length, class: "dim" }, empty)));
  node.replaceChildren(head, body);
}

const link = (text, act) => h("button", { type: "button", class: "link", on: { click: act } }, text);
const button = (text, act, kind = "small") => h("button", { type: "button", class: kind, on: { click: act } }, text);

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

function drawOverview() {
  const lately = seen.lately || {}, since = { since: "15m" };
  $("tiles").replaceChildren(
    tile(number(seen.in_flight), "under way"),
    tile(number(seen.waiting), "waiting for a slot", null, seen.waiting ? "warn" : null),
    tile(number(lately.requests), "requests, 15 min", since),
    tile(number(lately.failures), "failed at backends", { ...since, outcome: "backend_failed" }, lately.failures ? "bad" : null),
    tile(number(lately.refused), "refused", { ...since, outcome: "refused" }, lately.refused ? "warn" : null),
    tile(`${short(lately.prompt_tokens)} + ${short(lately.completion_tokens)}`, "tokens in + out"),
    tile(`${ms(lately.ttfb_p50_ms)}`, `first byte p50; p99 ${ms(lately.ttfb_p99_ms)}`),
    tile(seen.stores.redis ? "up" : "away", "Redis", null, seen.stores.redis ? "good" : "bad"),
    tile(seen.stores.postgresql ? "up" : "away", "PostgreSQL", null, seen.stores.postgresql ? "good" : "bad"),
    tile(number(seen.audit_backlog), "audit rows waiting", null, seen.audit_backlog > 10000 ? "warn" : null),
    tile(number(seen.processes), "processes"),
  );
  table($("backends"), [
    { name: "Backend", of: (row) => row.name },
    { name: "State", of: (row) => h("span", { class: row.drained ? "warn" : row.state === "up" ? "good" : "bad" }, row.drained ? "drained" : row.state) },
    { name: "Breaker", of: (row) => h("span", { class: row.breaker === "closed" ? null : "bad" }, row.breaker + (row.open_for_s ? ` ${Math.ceil(row.open_for_s)} s` : "")) },
    { name: "In flight", number: true, of: (row) => `${row.in_flight}/${row.max_connections}` },
    { name: "Latency", number: true, of: (row) => ms(row.latency_ms) },
    { name: "Models", number: true, of: (row) => number(row.models) },
    { name: "Loaded", wide: true, of: (row) => row.running.join(", ") || "–" },
    { name: "Last error", wide: true, of: (row) => h("span", { class: "bad" }, row.error) },
    { name: "", of: (row) => h("div", { class: "actions" },
      row.drained ? button("Undrain", () => act(`Give ${row.name} requests again?`, "Undrain", "POST", `/backends/${encodeURIComponent(row.name)}/undrain`))
        : button("Drain", () => act(`Give ${row.name} no new requests? Those under way finish.`, "Drain", "POST", `/backends/${encodeURIComponent(row.name)}/drain`)),
      button("Probe", () => trying(async () => tell(`Probe of ${row.name}`, await ask("POST", `/backends/${encodeURIComponent(row.name)}/probe`))))) },
  ], seen.backends, "no backends");
  table($("busy-keys"), [
    { name: "Key", wide: true, of: (row) => link(row.key || row.key_id, () => rowsOf({ key: row.key_id, since: "15m" })) },
    { name: "Requests", number: true, of: (row) => number(row.requests) },
    { name: "Tokens", number: true, of: (row) => short(row.tokens) },
    { name: "At a limit", number: true, of: (row) => (row.limited ? link(`${row.limited} (${row.limit || "?"})`, () => rowsOf({ key: row.key_id, since: "15m", status: "429" })) : "–") },
  ], lately.keys || [], seen.lately ? "nobody in the last 15 minutes" : "PostgreSQL is away");
  table($("busy-models"), [
    { name: "Model", wide: true, of: (row) => link(row.model, () => rowsOf({ model: row.model, since: "15m" })) },
    { name: "Requests", number: true, of: (row) => number(row.requests) },
    { name: "Tokens", number: true, of: (row) => short(row.tokens) },
    { name: "First byte p50", number: true, of: (row) => ms(row.ttfb_p50_ms) },
  ], lately.models || [], seen.lately ? "none in the last 15 minutes" : "PostgreSQL is away");
}

function plot(title, lines, series, format) {
  const width = 400, height = 130, left = 44, bottom = 18, top = 8, steps = series.steps;
  const from = new Date(series.since) / 1000, to = from + series.step_s * Math.round((Date.now() / 1000 - from) / series.step_s + 1);
  const most = Math.max(1e-9, ...steps.flatMap((step) => lines.map((line) => line.of(step) || 0)));
  const x = (at) => left + ((at - from) / (to - from)) * (width - left - 4), y = (value) => height - bottom - (value / most) * (height - bottom - top);
  const svg = s("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title, preserveAspectRatio: "none" });
  for (const share of [0, 0.5, 1]) {
    svg.append(s("line", { class: "grid", x1: left, x2: width, y1: y(most * share), y2: y(most * share) }), s("text", { x: left - 4, y: y(most * share) + 4, "text-anchor": "end" }, steps.length ? format(most * share) : ""));
  }
  for (const [at, anchor] of [[from, "start"], [to, "end"]]) svg.append(s("text", { x: x(at), y: height - 4, "text-anchor": anchor }, new Date(at * 1000).toLocaleString("sv").slice(series.window === "30d" ? 5 : 11, 16)));
  for (const line of lines) {
    const points = steps.filter((step) => line.of(step) !== null).map((step) => [x(step.at), y(line.of(step))]);
    svg.append(s("polyline", { class: line.kind, points: points.map((point) => point.join(",")).join(" ") }));
    for (const [cx, cy] of points) svg.append(s("circle", { class: line.kind, cx, cy, r: points.length > 60 ? 1 : 2 }));
  }
  const legend = h("div", { class: "legend" }, ...lines.map((line) => h("span", {}, h("i", { class: line.kind }), line.name)));
  return h("div", { class: "plot" }, h("h3", {}, title), svg, legend);
}

async function drawPlots() {
  const series = await ask("GET", `/series?window=${chosen}`), rate = series.step_s / 60;
  $("plots").replaceChildren(
    plot("Requests a minute", [{ name: "all", kind: "one", of: (step) => step.requests / rate }, { name: "refused", kind: "two-line", of: (step) => step.refused / rate }, { name: "failed", kind: "three", of: (step) => step.failures / rate }], series, short),
    plot("Tokens a minute", [{ name: "in", kind: "one", of: (step) => step.prompt_tokens / rate }, { name: "out", kind: "two-line", of: (step) => step.completion_tokens / rate }], series, short),
    plot("Time to the first byte", [{ name: "p50", kind: "one", of: (step) => step.ttfb_p50_ms }, { name: "p99", kind: "two-line", of: (step) => step.ttfb_p99_ms }], series, ms),
  );
}

// ── dialogs ──

function open(title, content, buttons) {
  const dialog = $("dialog");
  $("dialog-form").replaceChildren(h("h2", {}, title), ...content, h("p", { id: "dialog-problem", class: "bad", role: "alert", hidden: true }), h("div", { class: "buttons" }, ...buttons));
  if (!dialog.open) dialog.showModal();
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

function tell(title, facts) {
  open(title, [h("pre", {}, JSON.stringify(facts, null, 2))], [close()]);
}

function confirmed(question, word, work) {
  open(question, [], [close("Cancel"), h("button", { type: "button", class: "danger", id: "confirm", on: { click: () => { $("dialog").close(); trying(work); } } }, word)]);
}

function act(question, word, method, path, body) {
  confirmed(question, word, async () => { await ask(method, path, body); await look(); });
}

function shownOnce(made) {
  open("The key, shown this once", [h("p", {}, "It is stored nowhere: copy it now."), h("pre", { id: "new-key" }, made.key)], [button("Copy", (event) => copy(event.target, made.key), ""), close()]);
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
  const rows = await ask("GET", `/audit?${asked}`);
  table($("rows"), [
    { name: "Time", of: (row) => link(when(row.at), () => trying(async () => tell(`Request ${row.request_id}`, await ask("GET", `/requests/${encodeURIComponent(row.id)}`)))) },
    { name: "Key", wide: true, of: (row) => row.key || row.key_id },
    { name: "Model", wide: true, of: (row) => row.model || "–" },
    { name: "Backend", of: (row) => row.backend || "–" },
    { name: "Status", number: true, of: (row) => h("span", { class: row.status >= 500 ? "bad" : row.status >= 400 ? "warn" : null }, row.status || "–") },
    { name: "Outcome", wide: true, of: (row) => row.outcome + (row.detail ? ` (${row.detail})` : "") },
    { name: "Tokens", number: true, of: (row) => `${row.prompt_tokens} + ${row.completion_tokens}` },
    { name: "First byte", number: true, of: (row) => ms(row.ttfb_ms) },
    { name: "Total", number: true, of: (row) => ms(row.total_ms) },
  ], rows, "no such request");
  $("rows-shown").textContent = rows.length ? `the newest ${number(rows.length)}` : "";
}

// ── live ──

async function listen(signal) {
  const answer = await fetch("/admin/v1/events", { headers: { Authorization: `Bearer ${key.get()}` }, signal });
  if (!answer.ok) throw await refusalOf(answer);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += value;
    for (let end; (end = rest.indexOf("\n\n")) >= 0; rest = rest.slice(end + 2)) {
      seen = JSON.parse(rest.slice(6, end));
      live("live", "good");
      drawOverview();
    }
  }
}

function live(words, kind) {
  $("live").textContent = `● ${words}`;
  $("live").className = kind;
}

async function keepListening(signal) {
  while (!signal.aborted) {
    try { await listen(signal); } catch (problem) {
      if (signal.aborted) return;
      if (problem instanceof Refused) say(problem);
      if (problem.status === 401 || problem.status === 403) return;
    }
    live("not connected, trying again", "bad");
    await new Promise((done) => setTimeout(done, 2000));
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
  listening?.abort();
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
$("refresh").addEventListener("click", () => trying(async () => { tell("Models", await ask("POST", "/refresh")); await look(); }));
$("find-key").addEventListener("input", drawKeys);
$("make-key").addEventListener("click", makeKey);
$("filter").addEventListener("submit", (event) => { event.preventDefault(); trying(loadRows); });
setInterval(() => { if (seen && !$("overview").hidden) drawPlots().catch(() => {}); }, 15000);
if (key.get()) trying(async () => { await look(); enter(); });
