import { drawFleet } from "./fleet.js";
import { $, copy, h, reach } from "./nodes.js";
import { button, link, ms, number, seconds, short, some, table, update, when } from "./tables.js";

const SVG = "http://www.w3.org/2000/svg";

function s(tag, facts, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(facts)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

const key = { get: () => sessionStorage.getItem("gateway-key") || "", set: (value) => sessionStorage.setItem("gateway-key", value), forget: () => sessionStorage.removeItem("gateway-key") };
let latest = null, chosenWindow = "15m", events = null, allKeys = [], lastQuery = 0, lastDialog = 0, hasStreamError = false;

class RequestFailed extends Error {
  constructor(status, words) { super(words); this.status = status; }
}

async function errorOf(answer) {
  let words = answer.statusText;
  try { words = (await answer.json()).error || words; } catch { /* not JSON: the status is enough */ }
  const wait = answer.headers.get("retry-after");
  return new RequestFailed(answer.status, `${answer.status}: ${words}${answer.status === 429 && wait ? ` (retry in ${wait} s)` : ""}`);
}

async function request(method, path, body) {
  const headers = { Authorization: `Bearer ${key.get()}` };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const answer = await reach(`/admin/v1${path}`, { method, headers, body: body === undefined ? undefined : JSON.stringify(body) });
  if (!answer.ok) throw await errorOf(answer);
  return answer.json();
}

function showError(problem) {
  // An error in a dialog is shown in the dialog, which is in front.
  for (const place of [$("problem"), $("dialog").open && $("dialog-problem")].filter(Boolean)) {
    place.textContent = problem ? problem.message || String(problem) : "";
    place.hidden = !problem;
  }
  if (problem && (problem.status === 401 || (problem.status === 403 && !latest))) signOut();
}

async function guarded(work) {
  try { showError(null); return await work(); } catch (problem) { showError(problem); return undefined; }
}

function show(tab) {
  for (const name of ["overview", "keys", "audit"]) $(name).hidden = name !== tab;
  for (const one of $("tabs").children) one.dataset.tab === tab ? one.setAttribute("aria-current", "page") : one.removeAttribute("aria-current");
  if (tab === "keys") guarded(loadKeys);
  if (tab === "audit") guarded(loadRows);
}

function showRequests(filters) {
  for (const field of $("filter").elements) if (field.name) field.value = filters[field.name] || "";
  show("audit");
}

// ── overview ──

function tile(value, words, filters, kind) {
  const parts = [h("b", { class: kind }, value), h("span", {}, words)];
  return filters ? h("button", { type: "button", class: "tile", on: { click: () => showRequests(filters) } }, ...parts) : h("div", { class: "tile" }, ...parts);
}

const MOST_LOADED = 5;
const loadedModels = (names) => (names.length > MOST_LOADED ? h("details", {}, h("summary", {}, `${names.slice(0, MOST_LOADED).join(", ")} and ${names.length - MOST_LOADED} more`), names.slice(MOST_LOADED).join(", ")) : names.join(", ") || "–");

function stateOfPostgres() {
  if (!latest.stores.postgresql) return ["down", "PostgreSQL", null, "bad"];
  return latest.postgresql_takes_writes === false ? ["read-only", "PostgreSQL", null, "warn"] : ["up", "PostgreSQL", null, "good"];
}

function drawOverview() {
  const recent = latest.lately || {}, since = { since: "15m" };
  update($("tiles"), h("div", {},
    tile(number(latest.in_flight), "in progress"),
    tile(number(latest.waiting_for_backends), "waiting for a backend", null, latest.waiting_for_backends ? "warn" : null),
    tile(number(latest.waiting), "waiting for a slot of their key", null, latest.waiting ? "warn" : null),
    tile(number(recent.requests), "requests, 15 min", since),
    tile(number(recent.failures), "backend failures", { ...since, outcome: "backend_failed" }, recent.failures ? "bad" : null),
    tile(number(recent.refused), "refused", { ...since, outcome: "refused" }, recent.refused ? "warn" : null),
    tile(`${short(recent.prompt_tokens)} + ${short(recent.completion_tokens)}`, `tokens in + out${recent.cached_tokens ? `; ${short(recent.cached_tokens)} cached` : ""}`, since),
    tile(seconds(recent.backend_s), `of backends; ${some(recent.loads, "load")}`, since),
    tile(number(recent.waited), recent.waited ? `had to wait; p50 ${seconds(recent.wait_p50_ms / 1000)}, p99 ${seconds(recent.wait_p99_ms / 1000)}` : "had to wait for a backend", since),
    tile(`${ms(recent.ttfb_p50_ms)}`, `first byte p50; p99 ${ms(recent.ttfb_p99_ms)}`, since),
    tile(latest.stores.redis ? "up" : "unreachable", "Redis", null, latest.stores.redis ? "good" : "bad"),
    tile(...stateOfPostgres()),
    tile(number(latest.audit_backlog), "audit rows waiting", null, latest.audit_backlog > 10000 ? "warn" : null),
    tile(number(latest.processes), "processes"),
  ));
  drawFleet(latest, showRequests);
  table($("backends"), [
    { name: "Backend", of: (row) => row.name },
    { name: "State", of: (row) => h("span", { class: row.drained ? "warn" : row.state === "up" ? "good" : "bad" }, row.drained ? "drained" : row.state === "away" ? "down" : row.state) },
    { name: "Breaker", of: (row) => h("span", { class: row.breaker === "closed" ? null : "bad" }, row.breaker + (row.open_for_s ? ` ${Math.ceil(row.open_for_s)} s` : "")) },
    { name: "In progress", number: true, of: (row) => `${row.in_flight}/${row.max_connections}` },
    { name: "Latency", number: true, of: (row) => ms(row.latency_ms) },
    { name: "Models", number: true, of: (row) => number(row.models) },
    { name: "Speaks", wide: true, of: (row) => (row.speaks || []).join(", ") || "–" },
    { name: "Loaded", wide: true, of: (row) => loadedModels(row.running) },
    { name: "Last error", wide: true, of: (row) => h("span", { class: "bad" }, row.error) },
    { name: "", of: (row) => h("div", { class: "actions" },
      row.drained ? button("Undrain", () => confirmAction(`Send requests to ${row.name} again?`, "Undrain", "POST", `/backends/${encodeURIComponent(row.name)}/undrain`), "small", row.name)
        : button("Drain", () => confirmAction(`Stop sending new requests to ${row.name}? Requests in progress will finish.`, "Drain", "POST", `/backends/${encodeURIComponent(row.name)}/drain`), "small", row.name),
      button("Probe", () => showResult(`Probe of ${row.name}`, () => request("POST", `/backends/${encodeURIComponent(row.name)}/probe`)), "small", row.name)) },
  ], latest.backends, "no backends", true);
  table($("busy-keys"), [
    { name: "Key", wide: true, of: (row) => link(row.key || row.key_id, () => showRequests({ key: row.key_id, since: "15m" }), row.key_id) },
    { name: "Requests", number: true, of: (row) => number(row.requests) },
    { name: "Tokens", number: true, of: (row) => short(row.tokens) },
    { name: "Backend time", number: true, of: (row) => seconds(row.backend_s) + (row.loads ? `, ${some(row.loads, "load")}` : "") },
    { name: "Limited", number: true, of: (row) => (row.limited ? link(`${row.limited} (${row.limit || "?"})`, () => showRequests({ key: row.key_id, since: "15m", status: "429" }), row.key_id) : "–") },
  ], recent.keys || [], latest.lately ? "no requests in the last 15 minutes" : "unknown: PostgreSQL is unreachable", true);
  table($("busy-models"), [
    { name: "Model", wide: true, of: (row) => link(row.model, () => showRequests({ model: row.model, since: "15m" })) },
    { name: "Requests", number: true, of: (row) => number(row.requests) },
    { name: "Tokens", number: true, of: (row) => short(row.tokens) },
    { name: "Backend time", number: true, of: (row) => seconds(row.backend_s) + (row.loads ? `, ${some(row.loads, "load")}` : "") },
    { name: "First byte p50", number: true, of: (row) => ms(row.ttfb_p50_ms) },
  ], recent.models || [], latest.lately ? "no requests in the last 15 minutes" : "unknown: PostgreSQL is unreachable", true);
}

const LENGTHS = { "15m": 900, "24h": 86400, "30d": 2592000 };
const EMPTY_STEP = { requests: 0, refused: 0, failures: 0, prompt_tokens: 0, completion_tokens: 0, backend_s: 0, ttfb_p50_ms: null, ttfb_p99_ms: null };

// With the steps without requests, which the series leaves out.
function withEmptySteps(series, from, to) {
  const known = new Map(series.steps.map((step) => [Math.round(step.at / series.step_s), step])), all = [];
  for (let n = Math.ceil(from / series.step_s); n * series.step_s <= to; n += 1) all.push(known.get(n) || { ...EMPTY_STEP, at: n * series.step_s });
  return all;
}

function segments(values, isThere) {
  const found = [];
  let run = null;
  for (const value of values) {
    if (!isThere(value)) { run = null; continue; }
    if (!run) found.push(run = []);
    run.push(value);
  }
  return found;
}

function describe(lines, steps, format) {
  return lines.map((line) => {
    const values = steps.map((step) => line.of(step)).filter((value) => value !== null && value !== undefined);
    return values.length ? `${line.name} at most ${format(Math.max(...values))}, latest ${format(values.at(-1))}` : `${line.name} unknown`;
  }).join("; ");
}

function plot(title, lines, series, format) {
  const width = 400, height = 130, bottom = 18, top = 8, from = new Date(series.since) / 1000, to = from + LENGTHS[series.window], steps = withEmptySteps(series, from, to);
  const most = Math.max(1e-9, ...steps.flatMap((step) => lines.map((line) => line.of(step) || 0)));
  const left = Math.max(44, 12 + 7 * Math.max(...[0, 0.5, 1].map((share) => format(most * share).length)));
  const x = (at) => left + ((at - from) / (to - from)) * (width - left - 4), y = (value) => height - bottom - (value / most) * (height - bottom - top);
  const svg = s("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}: ${describe(lines, steps, format)}`, preserveAspectRatio: "none" });
  for (const share of [0, 0.5, 1]) {
    svg.append(s("line", { class: "grid", x1: left, x2: width, y1: y(most * share), y2: y(most * share) }), s("text", { x: left - 4, y: y(most * share) + 4, "text-anchor": "end" }, steps.length ? format(most * share) : ""));
  }
  for (const [at, anchor] of [[from, "start"], [to, "end"]]) svg.append(s("text", { x: x(at), y: height - 4, "text-anchor": anchor }, new Date(at * 1000).toLocaleString("sv").slice(series.window === "30d" ? 5 : 11, 16)));
  for (const line of lines) {
    const values = steps.map((step) => [step.at, line.of(step)]), isThere = ([, value]) => value !== null && value !== undefined;
    // A line is interrupted where nothing was measured.
    for (const run of segments(values, isThere)) svg.append(s("polyline", { class: line.kind, points: run.map(([at, value]) => `${x(at)},${y(value)}`).join(" ") }));
    for (const [at, value] of values.filter(isThere)) if (value > 0) svg.append(s("circle", { class: line.kind, cx: x(at), cy: y(value), r: values.length > 60 ? 1 : 2 }));
  }
  const legend = h("div", { class: "legend" }, ...lines.map((line) => h("span", {}, h("i", { class: line.kind }), line.name)));
  return h("div", { class: "plot" }, h("h3", {}, title), svg, legend);
}

async function drawPlots() {
  const wanted = chosenWindow, series = await request("GET", `/series?window=${wanted}`), rate = series.step_s / 60;
  if (wanted !== chosenWindow || !latest) return;
  $("plots").replaceChildren(
    plot("Requests per minute", [{ name: "all", kind: "one", of: (step) => step.requests / rate }, { name: "refused", kind: "two-line", of: (step) => step.refused / rate }, { name: "failed", kind: "three", of: (step) => step.failures / rate }], series, short),
    plot("Tokens per minute", [{ name: "in", kind: "one", of: (step) => step.prompt_tokens / rate }, { name: "out", kind: "two-line", of: (step) => step.completion_tokens / rate }], series, short),
    plot("Backend seconds per minute", [{ name: "all", kind: "one", of: (step) => (step.backend_s || 0) / rate }], series, seconds),
    plot("Time to first byte", [{ name: "p50", kind: "one", of: (step) => step.ttfb_p50_ms }, { name: "p99", kind: "two-line", of: (step) => step.ttfb_p99_ms }], series, ms),
  );
}

// ── dialogs ──

function open(title, content, buttons) {
  const dialog = $("dialog");
  $("dialog-form").replaceChildren(h("h2", { id: "dialog-title" }, title), ...content, h("p", { id: "dialog-problem", class: "bad", role: "alert", hidden: true }), h("div", { class: "buttons" }, ...buttons));
  if (!dialog.open) dialog.showModal();
  return (lastDialog += 1);
}

const closeButton = (text = "Close") => h("button", { type: "button", on: { click: () => $("dialog").close() } }, text);

// Also pressed by Enter in a field; disabled while it works, so that two clicks act once.
function submitButton(word, work) {
  const save = h("button", { type: "submit", id: "save", on: { click: async (event) => {
    event.preventDefault();
    save.disabled = true;
    await guarded(work);
    save.disabled = false;
  } } }, word);
  return save;
}

// A result is shown in the dialog that was opened for it, not in another one that is open by then.
async function showResult(title, work) {
  showError(null);
  const mine = open(title, [h("p", { class: "dim" }, "Loading…")], [closeButton()]), isMine = () => mine === lastDialog && $("dialog").open;
  try {
    const facts = await work();
    if (isMine()) open(title, [h("pre", {}, JSON.stringify(facts, null, 2))], [closeButton()]);
  } catch (problem) {
    if (isMine()) open(title, [], [closeButton()]);
    showError(problem);
  }
}

function askToConfirm(question, word, work) {
  open(question, [], [closeButton("Cancel"), h("button", { type: "button", class: "danger", id: "confirm", on: { click: (event) => { event.target.disabled = true; $("dialog").close(); guarded(work); } } }, word)]);
}

function confirmAction(question, word, method, path, body) {
  askToConfirm(question, word, async () => { await request(method, path, body); await loadOverview(); });
}

// An accidental Escape must not lose a key that is shown only once.
let mayClose = true;
$("dialog").addEventListener("cancel", (event) => {
  if (!$("new-key") || mayClose) return;
  event.preventDefault();
  mayClose = true;
  showError(new Error("This key is not copied yet. It cannot be shown again after this is closed."));
});
$("dialog").addEventListener("close", () => { if (!$("dialog").open) $("dialog-form").replaceChildren(); });

function showNewKey(made) {
  open("New key", [h("p", {}, "Copy the key now: it is shown only once; only its hash is stored."), h("pre", { id: "new-key" }, made.key)], [button("Copy", (event) => { mayClose = true; copy(event.target, made.key); }, ""), closeButton()]);
  mayClose = false;
}

const field = (name, words, facts = {}) => h("label", {}, words, h("input", { name, ...facts }));
const LIMITS = [["rpm", "Requests per minute"], ["tpm", "Tokens per minute"], ["concurrent", "Concurrent requests"], ["day", "Tokens per day"], ["month", "Tokens per month"], ["day_seconds", "Backend seconds per day"], ["month_seconds", "Backend seconds per month"]];

function limitsIn(form) {
  const found = {};
  for (const [name] of LIMITS) {
    const text = form.elements[name].value.trim();
    if (text) found[name] = text === "unlimited" ? text : text === "default" ? null : /^\d+$/.test(text) ? Number(text) : text;
  }
  return found;
}

function createKey() {
  const save = submitButton("Create", async () => {
    const form = $("dialog-form"), body = { name: form.elements.name.value.trim(), models: form.elements.models.value.split(/\s+/).filter(Boolean), role: form.elements.role.value, ...limitsIn(form) };
    if (form.elements.expires.value.trim()) body.expires = form.elements.expires.value.trim();
    const made = await request("POST", "/keys", body);
    showNewKey(made);
    await loadKeys();
  });
  open("Create key", [h("div", { class: "fields" }, field("name", "Name", { required: true }), field("models", "Models (empty: all)", { placeholder: "llama3* qwen3" }), field("expires", "Expires in", { placeholder: "30d" }),
    h("label", {}, "Role", h("select", { name: "role" }, h("option", { value: "user" }, "user"), h("option", { value: "admin" }, "admin"))),
    ...LIMITS.map(([name, words]) => field(name, words, { placeholder: "default" })))], [closeButton("Cancel"), save]);
}

function editLimits(row) {
  const save = submitButton("Save", () => confirmLimits(row));
  open(`Limits of ${row.name}`, [h("p", { class: "dim" }, "Enter a number, “unlimited” or “default”. Empty fields stay unchanged."),
    h("div", { class: "fields" }, ...LIMITS.map(([name, words]) => field(name, words, { placeholder: row[name] === null ? "default" : String(row[name]) })))], [closeButton("Cancel"), save]);
}

function confirmLimits(row) {
  const limits = limitsIn($("dialog-form")), words = Object.entries(limits).map(([name, value]) => `${name} ${value === null ? "default" : value}`).join(", ");
  if (!words) { $("dialog").close(); return; }
  askToConfirm(`Set ${words} for ${row.name}?`, "Set", async () => { await request("PATCH", `/keys/${encodeURIComponent(row.id)}`, limits); await loadKeys(); });
}

// ── keys ──

async function loadKeys() {
  allKeys = await request("GET", "/keys");
  drawKeys();
}

function drawKeys() {
  const wanted = $("find-key").value.trim().toLowerCase();
  const found = allKeys.filter((row) => !wanted || row.name.toLowerCase().includes(wanted) || row.id.includes(wanted)), shown = found.slice(0, 200);
  const limits = (row) => LIMITS.filter(([name]) => row[name] !== null).map(([name]) => `${name} ${number(row[name]) === "NaN" ? row[name] : number(row[name])}`).concat(row.rules).join("; ") || "default";
  table($("all-keys"), [
    { name: "Name", wide: true, of: (row) => link(row.name, () => showRequests({ key: row.id })) },
    { name: "ID", of: (row) => h("code", {}, row.id) },
    { name: "State", of: (row) => h("span", { class: row.state === "active" ? "good" : "dim" }, row.state + (row.flags.includes("admin") ? ", admin" : "")) },
    { name: "Models", wide: true, of: (row) => row.models.join(" ") },
    { name: "Limits", wide: true, of: limits },
    { name: "Last used", of: (row) => when(row.last_used_at) },
    { name: "", of: (row) => row.state === "active" && h("div", { class: "actions" },
      button("Limits", () => editLimits(row)),
      button("Rotate", () => askToConfirm(`Rotate the key ${row.name}? The old secret keeps working for 24 hours.`, "Rotate", async () => { showNewKey(await request("POST", `/keys/${encodeURIComponent(row.id)}/rotate`, { overlap: "24h" })); await loadKeys(); })),
      button("Revoke", () => askToConfirm(`Revoke ${row.name}? It stops working everywhere at once. This cannot be undone.`, "Revoke", async () => { await request("DELETE", `/keys/${encodeURIComponent(row.id)}`); await loadKeys(); }), "small danger")) || "" },
  ], shown, "no keys found");
  $("keys-shown").textContent = `${number(shown.length)} of ${number(found.length)} keys${found.length > shown.length ? ": search by name or ID to find the others" : ""}`;
}

// ── audit ──

// Why a request went to its backend, and how it reached it, if not byte for byte.
const wayOf = (row) => [row.chosen_because, row.translated_to && `translated to ${row.translated_to}`, row.dropped && `dropped ${row.dropped}`].filter(Boolean).join(", ");

// What the time to the first byte was estimated to be, and how much of it was waiting.
const timesOf = (row) => [typeof row.estimated_ms === "number" && `estimate ${ms(row.estimated_ms)}`, row.queue_position > 0 && `waited ${ms(row.queue_ms)}, place ${row.queue_position}`].filter(Boolean);

async function loadRows() {
  const query = new URLSearchParams();
  for (const item of $("filter").elements) if (item.name && item.value.trim()) query.set(item.name, item.value.trim());
  const mine = (lastQuery += 1), rows = await request("GET", `/audit?${query}`);
  if (mine !== lastQuery || !latest) return;
  table($("rows"), [
    { name: "Time", of: (row) => link(when(row.at), () => showResult(`Request ${row.request_id}`, () => request("GET", `/requests/${encodeURIComponent(row.id)}`)), row.id) },
    { name: "Key", wide: true, of: (row) => row.key || row.key_id },
    { name: "Model", wide: true, of: (row) => row.model || "–" },
    { name: "Backend", wide: true, of: (row) => h("div", {}, row.backend || "–", wayOf(row) && h("div", { class: "dim" }, wayOf(row))) },
    { name: "Status", number: true, of: (row) => h("span", { class: row.status >= 500 ? "bad" : row.status >= 400 ? "warn" : null }, row.status || "–") },
    { name: "Outcome", wide: true, of: (row) => row.outcome + (row.detail ? ` (${row.detail})` : "") },
    { name: "Tokens", number: true, of: (row) => `${row.prompt_tokens}${row.cached_tokens ? ` (${row.cached_tokens} cached)` : ""} + ${row.completion_tokens}` },
    { name: "Backend time", number: true, of: (row) => h("div", {}, ms(row.backend_ms), row.loaded && h("div", { class: "dim" }, `load ${ms(row.load_ms)}`)) },
    { name: "First byte", number: true, of: (row) => h("div", {}, ms(row.ttfb_ms), ...timesOf(row).map((words) => h("div", { class: "dim" }, words))) },
    { name: "Total", number: true, of: (row) => ms(row.total_ms) },
  ], rows, "no requests found");
  $("rows-shown").textContent = rows.length ? `the newest ${number(rows.length)}` : "";
}

// ── live updates ──

// An event comes every two seconds: silence means that the gateway or the network is stuck.
const SILENCE_MS = 8000, LONGEST_PAUSE_MS = 30000;

async function within(ms, reader) {
  let timer;
  const late = new Promise((_, failed) => { timer = setTimeout(() => { reader.cancel().catch(() => {}); failed(new Error("silence")); }, ms); });
  try { return await Promise.race([reader.read(), late]); } finally { clearTimeout(timer); }
}

async function readEvents(signal) {
  const answer = await reach("/admin/v1/events", { headers: { Authorization: `Bearer ${key.get()}` }, signal });
  if (!answer.ok) throw await errorOf(answer);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { done, value } = await within(SILENCE_MS, reader);
    if (done) return;
    rest += value;
    for (let end; (end = rest.indexOf("\n\n")) >= 0; rest = rest.slice(end + 2)) {
      latest = JSON.parse(rest.slice(6, end));
      showConnection("live", "good");
      if (hasStreamError) { hasStreamError = false; showError(null); }
      drawOverview();
    }
  }
}

function showConnection(words, kind) {
  if ($("live").textContent === `● ${words}`) return;
  $("live").textContent = `● ${words}`;
  $("live").className = kind;
}

async function followEvents(signal) {
  for (let pause = 1000; !signal.aborted; pause = Math.min(2 * pause, LONGEST_PAUSE_MS)) {
    try {
      const before = latest;
      await readEvents(signal);
      if (latest !== before) pause = 1000;
    } catch (problem) {
      if (signal.aborted) return;
      if (problem instanceof RequestFailed) { hasStreamError = true; showError(problem); }
      if (problem.status === 401 || problem.status === 403) { showConnection("stopped", "bad"); return; }
    }
    showConnection("disconnected, retrying", "bad");
    await new Promise((done) => setTimeout(done, pause));
  }
}

async function loadOverview() {
  latest = await request("GET", "/overview");
  drawOverview();
}

function signIn() {
  $("sign-in").hidden = true;
  for (const id of ["tabs", "sign-out"]) $(id).hidden = false;
  show("overview");
  events = new AbortController();
  followEvents(events.signal);
  guarded(drawPlots);
}

function signOut() {
  key.forget();
  latest = null;
  allKeys = [];
  events?.abort();
  $("dialog").close();
  for (const id of ["tiles", "fleet", "queues", "loading-keys", "plots", "backends", "busy-keys", "busy-models", "all-keys", "rows", "dialog-form"]) $(id).replaceChildren();
  for (const id of ["keys-shown", "rows-shown"]) $(id).textContent = "";
  $("filter").reset();
  $("find-key").value = "";
  for (const id of ["tabs", "sign-out", "overview", "keys", "audit"]) $(id).hidden = true;
  $("live").textContent = "";
  $("sign-in").hidden = false;
  $("key").value = "";
  $("key").focus();
}

$("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set($("key").value.trim());
  guarded(async () => { await loadOverview(); signIn(); });
});
$("sign-out").addEventListener("click", signOut);
$("tabs").addEventListener("click", (event) => event.target.dataset.tab && show(event.target.dataset.tab));
$("windows").addEventListener("click", (event) => {
  if (!event.target.dataset.window) return;
  chosenWindow = event.target.dataset.window;
  for (const one of $("windows").children) one.setAttribute("aria-pressed", one.dataset.window === chosenWindow);
  guarded(drawPlots);
});
$("refresh").addEventListener("click", () => showResult("Models", async () => { const result = await request("POST", "/refresh"); await loadOverview(); return result; }));
$("find-key").addEventListener("input", drawKeys);
$("create-key").addEventListener("click", createKey);
$("filter").addEventListener("submit", (event) => { event.preventDefault(); guarded(loadRows); });
setInterval(() => { if (latest && !$("overview").hidden) drawPlots().catch(() => {}); }, 15000);
if (key.get()) guarded(async () => { await loadOverview(); signIn(); });
