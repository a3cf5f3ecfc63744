import { $, copy, h, reach } from "./nodes.js";

const SAMPLES_ASK = "http://127.0.0.1:8080";
let openapi = {}, language = "curl";

// Text with `code` in backticks; several lines become a list.
function words(text) {
  const inline = (line) => line.split(/`([^`]+)`/).map((part, at) => (at % 2 ? h("code", {}, part) : part));
  const lines = String(text || "").split("\n");
  if (lines.length > 1) return h("ul", { class: "plain" }, lines.map((line) => h("li", {}, inline(line.replace(/^- /, "")))));
  return h("span", {}, inline(lines[0].replace(/^- /, "")));
}

const lookUp = (ref) => ref.split("/").slice(1).reduce((at, name) => at[name], openapi);
const resolved = (schema) => (schema.$ref ? { ...lookUp(schema.$ref), ...schema } : schema);

// ── shapes ──

function kind(schema) {
  const name = schema.$ref?.split("/").pop();
  const shape = resolved(schema);
  if (shape.const !== undefined) return JSON.stringify(shape.const);
  if (shape.enum) return shape.enum.map((value) => JSON.stringify(value)).join(" or ");
  const choices = shape.oneOf || (!shape.type && shape.anyOf);
  if (choices) return choices.map(kind).join(" or ");
  const types = [shape.type || "anything"].flat().map((type) => (type === "array" && shape.items ? `list of ${kind(shape.items)}` : type));
  return name && shape.properties ? name : types.join(" or ");
}

function bounds(shape) {
  const found = [];
  if (shape.default !== undefined) found.push(`default ${JSON.stringify(shape.default)}`);
  if (shape.minimum !== undefined) found.push(`from ${shape.minimum}`);
  if (shape.maximum !== undefined) found.push(`to ${shape.maximum}`);
  if (shape.maxLength !== undefined) found.push(`at most ${shape.maxLength} characters`);
  return found.join(", ");
}

const inner = (shape) => {
  const at = shape.items ? resolved(shape.items) : (shape.oneOf || []).map(resolved).find((one) => one.properties) || shape;
  return at.properties ? at : null;
};

function fields(schema) {
  const shape = inner(resolved(schema)) || {};
  if (!shape.properties) return h("p", { class: "dim" }, kind(schema), ". ", words(resolved(schema).description));
  return h("ul", { class: "shape" }, Object.entries(shape.properties).map(([name, of]) => {
    const field = resolved(of), below = inner(field);
    const required = (shape.required || []).includes(name);
    return h("li", {}, h("code", {}, name), " ", h("span", { class: "dim" }, [kind(of), required ? "required" : "", bounds(field)].filter(Boolean).join(" · ")),
      field.description && h("div", {}, words(field.description)), below && foldedSection("Fields", () => fields(of)));
  }));
}

// Built when it is opened, as schemas may be recursive.
function foldedSection(title, make) {
  const box = h("details", { on: { toggle: () => { if (box.open && box.childElementCount === 1) box.append(make()); } } }, h("summary", {}, title));
  return box;
}

// ── operations ──

function sample(samples) {
  const code = h("pre", { tabindex: "0" }), buttons = h("div", { class: "segments" });
  const source = () => samples.find((one) => one.label === language).source.replaceAll(SAMPLES_ASK, location.origin);
  const show = () => {
    code.textContent = source();
    for (const button of buttons.children) button.setAttribute("aria-pressed", String(button.textContent === language));
  };
  for (const { label } of samples) {
    buttons.append(h("button", { type: "button", class: "small", on: { click: () => { language = label; document.dispatchEvent(new Event("language")); } } }, label));
  }
  document.addEventListener("language", show);
  show();
  const copyButton = h("button", { type: "button", class: "small", on: { click: () => copy(copyButton, source()) } }, "Copy");
  return h("div", {}, h("div", { class: "row" }, buttons, copyButton), code);
}

const cell = (label, ...children) => h("td", { "data-label": label, class: "wide" }, h("span", {}, children));

function parameters(list) {
  const rows = list.map((one) => h("tr", {}, cell("Name", h("code", {}, one.name)), cell("In", one.in), cell("Type", [kind(one.schema), one.required ? "required" : "", bounds(one.schema)].filter(Boolean).join(" · ")), cell("Description", words(one.description))));
  return h("table", {}, h("thead", {}, h("tr", {}, ["Name", "In", "Type", "Description"].map((name) => h("th", {}, name)))), h("tbody", {}, rows));
}

function answers(responses) {
  const rows = Object.entries(responses).map(([status, given]) => {
    const one = resolved(given);
    const shapes = Object.entries(one.content || {}).map(([media, content]) => (content.schema ? foldedSection(media, () => fields(content.schema)) : h("div", { class: "dim" }, media)));
    return h("tr", {}, cell("Status", h("b", { class: /^[23d]/.test(status) ? "good" : "" }, status)), cell("Description", words(one.description)), cell("Schema", shapes));
  });
  return h("table", {}, h("thead", {}, h("tr", {}, ["Status", "Description", "Schema"].map((name) => h("th", {}, name)))), h("tbody", {}, rows));
}

function keyNeeded(operation) {
  if (!operation.security.length) return "No key needed.";
  if (operation.tags[0] === "Admin") return "Needs a key with the role admin.";
  return operation.operationId === "get_metrics" ? "Needs METRICS_TOKEN, or an address in METRICS_ALLOW." : "Needs a key.";
}

function details(operation) {
  const body = operation.requestBody && Object.values(operation.requestBody.content)[0];
  return h("div", { class: "operation" }, h("p", { class: "dim" }, keyNeeded(operation)),
    h("h3", {}, "Example"), sample(operation["x-codeSamples"]),
    operation.parameters && [h("h3", {}, "Parameters"), parameters(operation.parameters)],
    body && [h("h3", {}, "Request body"), fields(body.schema)],
    h("h3", {}, "Responses"), answers(operation.responses));
}

function route(method, path, operation) {
  const title = h("summary", {}, h("b", { class: `method ${method}` }, method.toUpperCase()), " ", h("code", {}, path), " ", h("span", { class: "dim" }, operation.summary));
  const box = h("details", { id: operation.operationId, class: "route", "data-words": `${method} ${path} ${operation.summary}`.toLowerCase() }, title);
  box.addEventListener("toggle", () => {
    if (!box.open) return;
    if (box.childElementCount === 1) box.append(details(operation));
    history.replaceState(null, "", `#${box.id}`);
  });
  return box;
}

function show() {
  const groups = openapi.tags.map(({ name }) => {
    const routes = Object.entries(openapi.paths).flatMap(([path, methods]) =>
      Object.entries(methods).filter(([, operation]) => operation.tags.includes(name)).map(([method, operation]) => route(method, path, operation)));
    return routes.length ? h("section", { class: "card" }, h("h2", {}, name), routes) : null;
  });
  const keys = Object.entries(openapi.components.securitySchemes).map(([, one]) => (one.name ? `${one.name}: nz_…` : one.scheme === "bearer" ? "Authorization: Bearer nz_…" : "Authorization: Basic, the key as the password"));
  $("document").append(h("section", { class: "card" }, h("p", {}, words(openapi.info.description)),
    h("p", {}, "Send the key in one of these headers: ", keys.flatMap((text, at) => [at ? "; " : "", h("code", {}, text)]), ", or in the URL: ", h("code", {}, `${location.origin}/k/nz_…/v1`), ".")), ...groups.filter(Boolean));
}

$("find").addEventListener("input", () => {
  const wanted = $("find").value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const box of document.querySelectorAll(".route")) box.hidden = !wanted.every((word) => box.dataset.words.includes(word));
  for (const group of document.querySelectorAll("section.card:has(.route)")) group.hidden = !group.querySelector(".route:not([hidden])");
  $("nothing").hidden = !wanted.length || document.querySelector(".route:not([hidden])") !== null;
});

async function load() {
  const answer = await reach("/openapi.json");
  if (!answer.ok) throw new Error(`/openapi.json: ${answer.status}`);
  openapi = await answer.json();
  show();
  openFragment();
}

function openFragment() {
  let name = location.hash.slice(1);
  try { name = decodeURIComponent(name); } catch { /* not one of our fragments: stay here */ }
  const wanted = $(name);
  if (wanted?.matches(".route")) { wanted.open = true; wanted.scrollIntoView(); }
}

window.addEventListener("hashchange", openFragment);

load().catch((wrong) => { $("problem").textContent = String(wrong.message || wrong); $("problem").hidden = false; });
