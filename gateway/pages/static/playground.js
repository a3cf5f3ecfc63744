import { StreamingMarkdown } from "./markdown.js";
import { $, copy, h, reach } from "./nodes.js";

const key = { get: () => sessionStorage.getItem("playground-key") || "", set: (value) => sessionStorage.setItem("playground-key", value), forget: () => sessionStorage.removeItem("playground-key") };
const button = (text, act, kind = "small") => h("button", { type: "button", class: kind, on: { click: act } }, text);
const IMAGE_TYPES = ["image/png", "image/jpeg", "image/webp", "image/gif"];
// Drawing takes at most a fifth of the time, and is not repeated faster than the eye can follow.
const SHOWN_EVERY_MS = 60, SHORTEST_MS = 20;
const hasVision = new Map();
let turns = [], running = null, images = [];

// ── the gateway ──

class RequestFailed extends Error {
  constructor(answer, words, wait) { super(`${answer.status}: ${words}`); this.status = answer.status; this.headers = answer.headers; this.until = Date.now() + wait * 1000; }
}

async function call(method, path, body, signal) {
  const headers = { Authorization: `Bearer ${key.get()}` };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const answer = await reach(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body), signal });
  if (answer.ok) return answer;
  const text = await answer.text();
  let words = text || answer.statusText;
  try { const { error } = JSON.parse(text); words = error?.message || error || words; } catch { /* as it is */ }
  throw new RequestFailed(answer, words, Number(answer.headers.get("retry-after-ms")) / 1000 || Number(answer.headers.get("retry-after")) || 0);
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += value.replaceAll("\r\n", "\n");
    for (let end; (end = rest.indexOf("\n\n")) >= 0; rest = rest.slice(end + 2)) {
      const data = rest.slice(0, end).split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5)).join("\n").trim();
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

// ── asking ──

function messagesUntil(turn, model) {
  const found = $("system").value.trim() ? [{ role: "system", content: $("system").value.trim() }] : [];
  for (const one of turns) {
    const content = one.images.length && hasVision.get(model) ? [{ type: "text", text: one.prompt }, ...one.images.map((url) => ({ type: "image_url", image_url: { url } }))] : one.prompt;
    found.push({ role: "user", content });
    if (one === turn) break;
    const answer = one.answers.find((given) => given.model === model) || one.answers[0];
    if (answer?.text) found.push({ role: "assistant", content: answer.text });
  }
  return found;
}

function requestBody(turn, model) {
  const body = { model, messages: messagesUntil(turn, model), stream: true, stream_options: { include_usage: true } };
  if ($("temperature").value) body.temperature = Number($("temperature").value);
  if ($("max-tokens").value) body.max_tokens = Number($("max-tokens").value);
  if ($("json").checked) body.response_format = { type: "json_object" };
  return body;
}

const FACTS = { id: "x-request-id", backend: "x-gateway-backend", requestsLeft: "x-ratelimit-remaining-requests", tokensLeft: "x-ratelimit-remaining-tokens" };
const read = (answer, headers) => { for (const [name, header] of Object.entries(FACTS)) answer[name] = headers.get(header); };

async function answerWith(answer, signal) {
  const began = performance.now();
  try {
    const reply = await call("POST", "/v1/chat/completions", answer.body, signal);
    read(answer, reply.headers);
    for await (const event of events(reply)) {
      if (event.error) throw new Error(event.error.message || "the answer was interrupted");
      const delta = event.choices?.[0]?.delta || {};
      answer.thinking += delta.reasoning || delta.reasoning_content || "";
      answer.text += delta.content || "";
      if (delta.content || delta.reasoning || delta.reasoning_content) {
        answer.first ??= performance.now() - began;
        answer.last = performance.now() - began;
      }
      answer.usage = event.usage || answer.usage;
      scheduleDraw(answer);
    }
  } catch (problem) {
    if (problem.name === "AbortError") answer.stopped = true;
    else { answer.problem = problem; if (problem.headers) read(answer, problem.headers); }
  }
  answer.done = true;
  clearTimeout(answer.timer);
  answer.draw();
}

function scheduleDraw(answer) {
  if (answer.timer) return;
  answer.timer = setTimeout(() => {
    const began = performance.now();
    answer.draw();
    answer.rest = 4 * (performance.now() - began);
    answer.timer = null;
  }, Math.max(SHOWN_EVERY_MS, answer.rest));
}

async function answerTurn(turn) {
  const models = [...new Set([$("model").value, $("compare").value].filter(Boolean))];
  const mine = running = new AbortController();
  try {
    turn.answers = models.map((model) => ({ model, body: requestBody(turn, model), isBlind: turn.images.length > 0 && !hasVision.get(model), text: "", thinking: "", first: null, last: 0, usage: null, done: false, timer: null, rest: 0, draw: () => {} }));
    draw();
    updateButtons();
    if (document.activeElement === document.body) $("stop").focus();
    await Promise.all(turn.answers.map((answer) => answerWith(answer, mine.signal)));
  } finally {
    if (running === mine) running = null;
    const isLost = [document.body, $("stop")].includes(document.activeElement);
    updateButtons();
    drawActions();
    if (isLost && !running) $("prompt").focus();
  }
}

function updateButtons() {
  $("stop").hidden = running === null;
  $("send").disabled = running !== null;
}

function newChat() {
  running?.abort();
  running = null;
  turns = [];
  images = [];
  drawImages();
  draw();
  updateButtons();
}

// ── showing ──

// A body of the chat API in the form of each API, and what its official Python client prints of it.
const textOf = (messages) => messages.filter((message) => message.role === "system").map((message) => message.content).join("\n");
const withParts = (messages, part) => messages.filter((message) => message.role !== "system").map(({ role, content }) => ({ role, content: typeof content === "string" ? content : content.map(part) }));

function messagesBody({ model, messages, temperature, max_tokens, response_format: format }) {
  const image = (url) => { const [, type, data] = url.match(/^data:([^;]*);base64,(.*)$/s); return { type: "image", source: { type: "base64", media_type: type, data } }; };
  return { model, ...(textOf(messages) && { system: textOf(messages) }), messages: withParts(messages, (part) => (part.type === "text" ? part : image(part.image_url.url))), max_tokens: max_tokens ?? 4096, ...(temperature !== undefined && { temperature }), ...(format && { output_config: { format: { type: "json_schema", schema: { type: "object" } } } }), stream: true };
}

function responsesBody({ model, messages, temperature, max_tokens, response_format: format }) {
  const part = (one) => (one.type === "text" ? { type: "input_text", text: one.text } : { type: "input_image", image_url: one.image_url.url });
  return { model, ...(textOf(messages) && { instructions: textOf(messages) }), input: withParts(messages, part), ...(max_tokens !== undefined && { max_output_tokens: max_tokens }), ...(temperature !== undefined && { temperature }), ...(format && { text: { format } }), stream: true };
}

// Versions of Anthropic's client differ in which other fields they know, such as the temperature.
const apis = {
  "OpenAI chat": { path: "/v1/chat/completions", of: (body) => body, headers: {}, python: ["from openai import OpenAI", "OpenAI", "/v1", "for chunk in client.chat.completions.create(**body):\n    if chunk.choices:\n        print(chunk.choices[0].delta.content or \"\", end=\"\", flush=True)"] },
  "OpenAI Responses": { path: "/v1/responses", of: responsesBody, headers: {}, python: ["from openai import OpenAI", "OpenAI", "/v1", "for event in client.responses.create(**body):\n    if event.type == \"response.output_text.delta\":\n        print(event.delta, end=\"\", flush=True)"] },
  "Anthropic Messages": { path: "/v1/messages", of: messagesBody, headers: { "anthropic-version": "2023-06-01" }, python: ["from anthropic import Anthropic", "Anthropic", "", "needed = {name: body.pop(name) for name in (\"model\", \"max_tokens\", \"messages\", \"stream\")}\nfor event in client.messages.create(**needed, extra_body=body):\n    if event.type == \"content_block_delta\" and event.delta.type == \"text_delta\":\n        print(event.delta.text, end=\"\", flush=True)"] },
};

const examples = {
  curl: ({ path, headers }, body) => `curl -N ${location.origin}${path} \\\n  -H "Authorization: Bearer $KEY" -H "Content-Type: application/json"${Object.entries(headers).map(([name, value]) => ` -H "${name}: ${value}"`).join("")} \\\n  --data-binary @- <<'END'\n${body}\nEND`,
  Python: ({ python: [imported, client, base, reading] }, body) => `import json\nimport os\n${imported}\n\nclient = ${client}(base_url="${location.origin}${base}", api_key=os.environ["KEY"])\nbody = json.loads(r'''${body.replaceAll("'", "\\u0027")}''')\n${reading}`,
  JavaScript: ({ path, headers }, body) => `const answer = await fetch("${location.origin}${path}", {\n  method: "POST",\n  headers: { Authorization: \`Bearer \${process.env.KEY}\`, "Content-Type": "application/json"${Object.entries(headers).map(([name, value]) => `, "${name}": "${value}"`).join("")} },\n  body: JSON.stringify(${body}),\n});\nfor await (const piece of answer.body.pipeThrough(new TextDecoderStream())) process.stdout.write(piece);`,
};

function copyButtons(answer) {
  const api = h("select", { "aria-label": "API of the copied call" }, ...Object.keys(apis).map((name) => h("option", { value: name }, name)));
  const text = (of) => of(apis[api.value], JSON.stringify(apis[api.value].of(answer.body)));
  return [...Object.entries(examples).map(([name, of]) => button(`Copy as ${name}`, (event) => copy(event.target, text(of)))), api];
}

function detailsOf(answer) {
  const facts = [];
  if (answer.backend) facts.push(`backend ${answer.backend}`);
  if (answer.id) facts.push(`request ${answer.id}`);
  const { prompt_tokens: prompt, completion_tokens: completion } = answer.usage || {};
  if (prompt !== undefined || completion !== undefined) facts.push(`${prompt ?? "?"} + ${completion ?? "?"} tokens`);
  if (answer.first !== null) facts.push(`first token ${Math.round(answer.first)} ms`);
  // A rate needs more than one moment.
  if (completion > 1 && answer.last - answer.first >= SHORTEST_MS) facts.push(`${((completion - 1) * 1000 / (answer.last - answer.first)).toFixed(1)} tokens/s`);
  if (answer.requestsLeft) facts.push(`left this minute: ${answer.requestsLeft} requests${answer.tokensLeft ? `, ${answer.tokensLeft} tokens` : ""}`);
  if (answer.stopped) facts.push("stopped");
  if (answer.isBlind) facts.push("sent without the image: this model does not accept images");
  return facts;
}

function errorBox(turn, answer) {
  // Only the message is an alert: the countdown must not be announced every second.
  const shown = h("p", { class: "bad" }, h("span", { role: "alert" }, answer.problem.message));
  const { status, until } = answer.problem;
  if (status !== 429 || until <= Date.now()) return shown;
  const left = h("span", { class: "countdown" });
  const again = button("Try again", () => retry(turn));
  again.disabled = true;
  const tick = () => {
    const seconds = Math.ceil((until - Date.now()) / 1000);
    left.textContent = seconds > 0 ? ` retry in ${seconds} s ` : " ";
    again.disabled = seconds > 0 || running !== null;
    if (left.isConnected) setTimeout(tick, 250);
  };
  setTimeout(tick);
  shown.append(left, again);
  return shown;
}

function drawAnswer(turn, answer) {
  const text = h("div", { class: "answer-text" }), thinking = h("details", { class: "thinking", hidden: true }, h("summary", {}, "Thinking"), h("div")), below = h("div");
  const box = h("article", { class: "card answer", "aria-busy": "true" }, h("h3", {}, answer.model), thinking, text, below);
  const markdown = new StreamingMarkdown(text);
  answer.draw = () => {
    markdown.show(answer.text);
    thinking.hidden = !answer.thinking;
    if (thinking.lastChild.textContent.length !== answer.thinking.length) thinking.lastChild.textContent = answer.thinking;
    if (!answer.done) return;
    box.removeAttribute("aria-busy");
    below.replaceChildren(...(answer.problem ? [errorBox(turn, answer)] : []), h("div", { class: "facts" }, ...detailsOf(answer).map((fact) => h("span", {}, fact))), h("div", { class: "actions" }, button("Copy", (event) => copy(event.target, answer.text)), ...copyButtons(answer)));
  };
  answer.draw();
  return box;
}

function draw() {
  $("conversation").replaceChildren(...turns.map((turn) => {
    const question = h("div", { class: "question" }, turn.prompt, turn.images.length ? h("div", { class: "images" }, ...turn.images.map((src) => h("img", { src, alt: "image in your message" }))) : null, h("div", { class: "actions" }));
    turn.actions = question.lastChild;
    return h("section", { class: "turn" }, question, h("div", { class: "answers" }, ...turn.answers.map((answer) => drawAnswer(turn, answer))));
  }));
  drawActions();
}

function drawActions() {
  for (const turn of turns) turn.actions.replaceChildren(...(running ? [] : [button("Edit", () => edit(turn)), button("Retry", () => retry(turn))]));
}

function edit(turn) {
  if (running) return;
  $("prompt").value = turn.prompt;
  images = turn.images;
  drawImages();
  turns = turns.slice(0, turns.indexOf(turn));
  draw();
  $("prompt").focus();
}

function retry(turn) {
  if (running) return;
  turns = turns.slice(0, turns.indexOf(turn) + 1);
  answerTurn(turn);
}

function drawImages() {
  const remove = (src) => { images = images.filter((one) => one !== src); drawImages(); $("prompt").focus(); };
  $("images").replaceChildren(...images.map((src) => h("span", { class: "image" }, h("img", { src, alt: "image to send" }), button("Remove", () => remove(src)))));
}

// ── models ──

async function loadModels() {
  const names = (await (await call("GET", "/v1/models")).json()).data.map((model) => model.id);
  const options = () => names.map((name) => h("option", { value: name }, name));
  $("model").replaceChildren(...options());
  $("compare").replaceChildren(h("option", { value: "" }, "none"), ...options());
  $("embed-model").replaceChildren(...options());
  if (!names.length) throw new Error("There is no model that this key may use.");
  await loadCapabilities();
}

async function loadCapabilities() {
  const models = () => [$("model").value, $("compare").value].filter(Boolean);
  const show = () => { $("add-image").hidden = !models().some((model) => hasVision.get(model)); };
  show();
  for (const model of models()) {
    if (hasVision.has(model)) continue;
    try {
      const shown = await (await call("POST", "/api/show", { model })).json();
      hasVision.set(model, (shown.capabilities || []).includes("vision"));
    } catch { /* then it counts as one without vision */ }
  }
  show();
}

// ── embeddings ──

function similarity(a, b) {
  let dot = 0, one = 0, two = 0;
  for (let n = 0; n < a.length; n += 1) { dot += a[n] * b[n]; one += a[n] * a[n]; two += b[n] * b[n]; }
  return dot / Math.sqrt(one * two || 1);
}

async function embed() {
  const texts = $("texts").value.split("\n").map((line) => line.trim()).filter(Boolean);
  const reply = await (await call("POST", "/v1/embeddings", { model: $("embed-model").value, input: texts })).json();
  const vectors = reply.data.map((one) => one.embedding);
  const head = h("tr", {}, ...["Text", "Dimensions", "First values", "Similarity to the first"].map((name) => h("th", {}, name)));
  const rows = vectors.map((vector, n) => h("tr", {}, h("td", { class: "wide", "data-label": "Text" }, texts[n]), h("td", { class: "number", "data-label": "Dimensions" }, vector.length), h("td", { class: "wide", "data-label": "First values" }, vector.slice(0, 5).map((value) => value.toFixed(4)).join(", ")), h("td", { class: "number", "data-label": "Similarity to the first" }, similarity(vectors[0], vector).toFixed(4))));
  $("vectors").replaceChildren(h("div", { class: "scroll" }, h("table", {}, h("thead", {}, head), h("tbody", {}, ...rows))), h("p", { class: "dim" }, reply.usage ? `${reply.usage.prompt_tokens} tokens` : ""));
}

// ── the page ──

function showError(problem) {
  $("problem").textContent = problem ? problem.message : "";
  $("problem").hidden = !problem;
  if (problem?.status === 401) signOut();
}

async function guarded(work) {
  try { showError(null); await work(); } catch (problem) { showError(problem); }
}

function show(tab) {
  for (const name of ["chat", "embed"]) $(name).hidden = name !== tab;
  for (const one of $("tabs").children) one.dataset.tab === tab ? one.setAttribute("aria-current", "page") : one.removeAttribute("aria-current");
}

// A header cannot carry anything else.
function checkedKey(text) {
  if (!/^[\x21-\x7e]+$/.test(text)) throw new Error("This is not a key: keys have letters, digits and underscores only.");
  return text;
}

async function signIn() {
  await loadModels();
  $("sign-in").hidden = true;
  for (const id of ["tabs", "sign-out"]) $(id).hidden = false;
  show("chat");
  $("prompt").focus();
}

function signOut() {
  key.forget();
  hasVision.clear();
  newChat();
  for (const form of ["settings", "composer", "embed-form"]) $(form).reset();
  $("vectors").replaceChildren();
  for (const id of ["tabs", "sign-out", "chat", "embed"]) $(id).hidden = true;
  $("sign-in").hidden = false;
  $("key").value = "";
  $("key").focus();
}

$("sign-in").addEventListener("submit", (event) => { event.preventDefault(); guarded(async () => { key.set(checkedKey($("key").value.trim())); await signIn(); }); });
$("sign-out").addEventListener("click", signOut);
$("tabs").addEventListener("click", (event) => event.target.dataset.tab && show(event.target.dataset.tab));
for (const id of ["model", "compare"]) $(id).addEventListener("change", loadCapabilities);
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running || !$("prompt").value.trim()) return;
  const turn = { prompt: $("prompt").value.trim(), images, answers: [], actions: null };
  turns.push(turn);
  $("prompt").value = "";
  images = [];
  drawImages();
  answerTurn(turn);
});
$("prompt").addEventListener("keydown", (event) => { if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("composer").requestSubmit(); } });
$("stop").addEventListener("click", () => running?.abort());
$("new-chat").addEventListener("click", newChat);
const dataOf = (file) => new Promise((done, failed) => { const reader = new FileReader(); reader.onload = () => done(reader.result); reader.onerror = () => failed(reader.error); reader.readAsDataURL(file); });
$("image").addEventListener("change", (event) => guarded(async () => {
  const files = [...event.target.files], other = files.find((file) => !IMAGE_TYPES.includes(file.type));
  event.target.value = "";
  if (other) throw new Error(`${other.name} is not an image: use PNG, JPEG, WebP or GIF.`);
  images = [...images, ...await Promise.all(files.map(dataOf))];
  drawImages();
}));
$("embed-form").addEventListener("submit", (event) => { event.preventDefault(); guarded(embed); });
if (key.get()) guarded(signIn);
