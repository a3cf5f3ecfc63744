// The fleet: memory, loaded models and slots of each backend, the queues, and who causes loads.
import { $, h } from "./nodes.js";
import { link, number, seconds, short, some, table, update } from "./tables.js";

const MOST_CARDS = 12, MOST_PLACES = 6, MOST_PIPS = 8;

const bytes = (value) => (value >= 1e9 ? `${(value / 1e9).toFixed(1)} GB` : `${(value / 1e6).toFixed(0)} MB`);

// How long a model stays loaded if nobody calls it.
function stay(value) {
  if (value === null) return "stays";
  return value < 60 ? `${Math.ceil(value)} s left` : value < 3600 ? `${Math.round(value / 60)} min left` : `${Math.round(value / 3600)} h left`;
}

function slots(place) {
  if (place.slots === null) return place.in_use ? `${place.in_use} in use` : "";
  if (place.in_use === null) return `?/${place.slots}`;
  const used = Math.min(place.in_use, place.slots), isFull = place.in_use >= place.slots;
  const pips = place.slots <= MOST_PIPS && h("span", { class: "pips", "aria-hidden": "true" }, h("span", { class: isFull ? "warn" : "busy" }, "●".repeat(used)), "○".repeat(place.slots - used));
  return [h("span", { class: isFull ? "warn" : null }, `${place.in_use}/${place.slots}`), pips];
}

function speeds(place) {
  const read = place.prefill_tps && `${short(place.prefill_tps)} in`, written = place.decode_tps && `${short(place.decode_tps)} out`;
  return read || written ? `${[read, written].filter(Boolean).join(", ")} tok/s` : "";
}

function placeLine(place, swaps, loadingModel) {
  const facts = [
    swaps && (place.is_loaded ? [place.vram ? bytes(place.vram) : "", stay(place.left_s)] : place.model === loadingModel ? "loading" : "not loaded"),
    speeds(place),
    swaps && place.load_s && `load ${seconds(place.load_s)}`,
  ].flat().filter(Boolean);
  return h("li", { class: place.in_use ? null : "idle" }, h("span", { class: "model" }, place.model), h("span", { class: "slots" }, slots(place)), h("span", { class: "dim" }, facts.join(" · ")));
}

function memory(row) {
  if (!row.memory) return null;
  const { used, seen } = row.memory;
  if (!seen) return h("div", { class: "dim" }, "nothing loaded so far");
  const words = used ? `${bytes(used)} loaded, at most ${bytes(seen)} seen` : `nothing loaded, at most ${bytes(seen)} seen`;
  return h("div", { class: "meter" }, h("progress", { max: seen, value: used, "aria-label": `Memory of ${row.name}: ${words}` }), h("span", {}, words));
}

function loading(row) {
  if (!row.loading) return null;
  const { model, for_s: passed, left_s: left } = row.loading, words = left > 0 ? `about ${seconds(left)} left` : `for ${seconds(passed)} already`;
  return h("div", { class: "meter warn" }, h("progress", { max: passed + left, value: passed, "aria-label": `loading ${model} on ${row.name}` }), h("span", {}, `loading ${model}, ${words}`));
}

function state(row) {
  if (row.drained) return ["warn", "drained"];
  if (row.state !== "up") return ["bad", row.state === "away" ? "down" : row.state];
  return row.breaker === "closed" ? ["good", "up"] : ["bad", `breaker ${row.breaker}`];
}

function history(row) {
  const done = row.lately, known = row.memory;
  // Not every backend reports how long a load has taken.
  const loads = done?.loads ? `, ${some(done.loads, "load")}${done.load_s ? ` (${seconds(done.load_s)})` : ""}` : "";
  return [
    h("div", { class: "dim" }, done ? `15 min: ${some(done.requests, "call")}, ${seconds(done.backend_s)} busy${loads}` : "15 min: no calls"),
    known && (known.loads || known.evictions) ? h("div", { class: "dim" }, `seen: ${some(known.loads, "load")}, ${some(known.evictions, "eviction")}`) : null,
  ];
}

function card(row) {
  const [kind, words] = state(row), swaps = Boolean(row.memory), places = (row.places || []).map((place) => placeLine(place, swaps, row.loading?.model));
  const more = places.splice(MOST_PLACES);
  return h("article", { class: "backend", "data-of": row.name },
    h("div", { class: "row" }, h("h3", {}, row.name), h("span", { class: kind }, words)),
    memory(row), loading(row),
    h("ul", { class: "places" }, ...places),
    more.length > 0 && h("details", {}, h("summary", {}, `${more.length} more models`), h("ul", { class: "places" }, ...more)),
    history(row));
}

function drawQueues(latest) {
  table($("queues"), [
    { name: "Model", wide: true, of: (row) => row.model },
    { name: "Waiting", number: true, of: (row) => h("span", { class: "warn" }, number(row.calls)) },
    { name: "Tokens", number: true, of: (row) => short(row.tokens) },
    { name: "Oldest", number: true, of: (row) => seconds(row.oldest_s) },
    { name: "Next in", number: true, of: (row) => seconds(row.first_s) },
    { name: "Last in", number: true, of: (row) => seconds(row.last_s) },
  ], latest.queues || [], latest.queues ? "no call waits for a backend" : "unknown: Redis is unreachable", true);
}

export function drawFleet(latest, showRequests) {
  const cards = latest.backends.map(card), more = cards.splice(MOST_CARDS);
  update($("fleet"), h("div", {}, h("div", { class: "backends" }, ...cards),
    more.length > 0 && h("details", {}, h("summary", {}, `${more.length} more backends`), h("div", { class: "backends" }, ...more))));
  drawQueues(latest);
  table($("loading-keys"), [
    { name: "Key", wide: true, of: (row) => link(row.key || row.key_id, () => showRequests({ key: row.key_id, since: "15m" }), row.key_id) },
    { name: "Loads", number: true, of: (row) => number(row.loads) },
    { name: "Load time", number: true, of: (row) => seconds(row.load_s || null) },
    { name: "Mostly", wide: true, of: (row) => row.model || "–" },
  ], latest.lately?.loading_keys || [], latest.lately ? "no loads in the last 15 minutes" : "unknown: PostgreSQL is unreachable", true);
}
