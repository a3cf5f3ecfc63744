import { Growing } from "./markdown.js";
import { $, copy, h, reach } from "./nodes.js";

const key = { get: () => sessionStorage.getItem("playground-key") || "", set: (value) => sessionStorage.setItem("playground-key", value), forget: () => sessionStorage.removeItem("playground-key") };
const button = (text, act, kind = "small") => h("button", { type: "button", class: kind, on: { click: act } }, text);
const PICTURES = ["image/png", "image/jpeg", "image/webp", "image/gif"];
// Showing costs time: it takes at most a fifth of it, and is done no more often than eyes can follow.
const SHOWN_EVERY_MS = 60, SHORTEST_MS = 20;
const eyes = new Map();
let turns = [], running = null, pictures = [];

// ── the gateway ──

class Refused extends Error {
  constructor(answer, words, wait) { super(`${answer.status}: ${words}`); this.status = answer.status; this.headers = answer.headers; this.until = Date.now() + wait * 1000; }
}

async function call(method, path, body, signal) {
  const headers = { Authorization: `Bearer ${key.get()}` };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const answer = await reach(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body), signal });
  if (answer.ok) return answer;
  const text = await answer.text();
  let words = text || answer.statusText;
  try { const told = JSON.parse(text).error; words = told?.message || told || words; } catch { /* as it is */ }
  throw new Refused(answer, words, Number(answer.headers.get("retry-after-ms")) / 1000 || Number(answer.headers.get("retry-after")) || 0);
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
    const content = one.pictures.length && eyes.get(model) ? [{ type: "text", text: one.prompt }, ...one.pictures.map((url) => ({ type: "image_url", image_url: { url } }))] : one.prompt;
    found.push({ role: "user", content });
    if (one === turn) break;
    const answer = one.answers.find((given) => given.model === model) || one.answers[0];
    if (answer?.text) found.push({ role: "assistant", content: answer.text });
  }
  return found;
}

function bodyOf(turn, model) {
  const body = { model, messages: messagesUntil(turn, model), stream: true, stream_options: { include_usage: true } };
  if ($("temperature").value) body.temperature = Number($("temperature").value);
  if ($("most").value) body.max_tokens = Number($("most").value);
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
      if (event.error) throw new Error(event.error.message || "the answer broke off");
      const delta = event.choices?.[0]?.delta || {};
      answer.thinking += delta.reasoning || delta.reasoning_content || "";
      answer.text += delta.content || "";
      if (delta.content || delta.reasoning || delta.reasoning_content) {
        answer.first ??= performance.now() - began;
        answer.last = performance.now() - began;
      }
      answer.usage = event.usage || answer.usage;
      soon(answer);
    }
  } catch (problem) {
    if (problem.name === "AbortError") answer.stopped = true;
    else { answer.problem = problem; if (problem.headers) read(answer, problem.headers); }
  }
  answer.done = true;
  clearTimeout(answer.timer);
  answer.draw();
}

function soon(answer) {
  if (answer.timer) return;
  answer.timer = setTimeout(() => {
    const began = performance.now();
    answer.draw();
    answer.rest = 4 * (performance.now() - began);
    answer.timer = null;
  }, Math.max(SHOWN_EVERY_MS, answer.rest));
}

async function run(turn) {
  const models = [...new Set([$("model").value, $("second").value].filter(Boolean))];
  const mine = running = new AbortController();
  try {
    turn.answers = models.map((model) => ({ model, body: bodyOf(turn, model), isBlind: turn.pictures.length > 0 && !eyes.get(model), text: "", thinking: "", first: null, last: 0, usage: null, done: false, timer: null, rest: 0, draw: () => {} }));
    draw();
    busy();
    if (document.activeElement === document.body) $("stop").focus();
    await Promise.all(turn.answers.map((answer) => answerWith(answer, mine.signal)));
  } finally {
    if (running === mine) running = null;
    const isLost = [document.body, $("stop")].includes(document.activeElement);
    busy();
    drawActions();
    if (isLost && !running) $("prompt").focus();
  }
}

function busy() {
  $("stop").hidden = running === null;
  $("send").disabled = running !== null;
}

function forgetTalk() {
  running?.abort();
  running = null;
  turns = [];
  pictures = [];
  drawPictures();
  draw();
  busy();
}

// ── showing ──

const examples = {
  curl: (body) => `curl -N ${location.origin}/v1/chat/completions \\\n  -H "Authorization: Bearer $KEY" -H "Content-Type: application/json" \\\n  --data-binary @- <<'END'\n${JSON.stringify(body)}\nEND`,
  Python: (body) => `import json\nimport os\nfrom openai import OpenAI\n\nclient = OpenAI(base_url="${location.origin}/v1", api_key=os.environ["KEY"])\nbody = json.loads(r'''${JSON.stringify(body).replaceAll("'", "\\u0027")}''')\nfor chunk in client.chat.completions.create(**body):\n    if chunk.choices:\n        print(chunk.choices[0].delta.content or "", end="", flush=True)`,
  JavaScript: (body) => `const answer = await fetch("${location.origin}/v1/chat/completions", {\n  method: "POST",\n  headers: { Authorization: \`Bearer \${process.env.KEY}\`, "Content-Type": "application/json" },\n  body: JSON.stringify(${JSON.stringify(body)}),\n});\nfor await (const piece of answer.body.pipeThrough(new TextDecoderStream())) process.stdout.write(piece);`,
};

function factsOf(answer) {
  const facts = [];
  if (answer.backend) facts.push(`backend ${answer.backend}`);
  if (answer.id) facts.push(`request ${answer.id}`);
  const { prompt_tokens: asked, completion_tokens: told } = answer.usage || {};
  if (asked !== undefined || told !== undefined) facts.push(`${asked ?? "?"} + ${told ?? "?"} tokens`);
  if (answer.first !== null) facts.push(`first token ${Math.round(answer.first)} ms`);
  // What came at one moment came at no speed.
  if (told > 1 && answer.last - answer.first >= SHORTEST_MS) facts.push(`${((told - 1) * 1000 / (answer.last - answer.first)).toFixed(1)} tokens/s`);
  if (answer.requestsLeft) facts.push(`left this minute: ${answer.requestsLeft} requests${answer.tokensLeft ? `, ${answer.tokensLeft} tokens` : ""}`);
  if (answer.stopped) facts.push("stopped");
  if (answer.isBlind) facts.push("without the picture, which this model cannot see");
  return facts;
}

function problemOf(turn, answer) {
  // A countdown is no news each second.
  const shown = h("p", { class: "bad" }, h("span", { role: "alert" }, answer.problem.message));
  const { status, until } = answer.problem;
  if (status !== 429 || until <= Date.now()) return shown;
  const left = h("span", { class: "countdown" });
  const again = button("Try again", () => retry(turn));
  again.disabled = true;
  const tick = () => {
    const seconds = Math.ceil((until - Date.now()) / 1000);
    left.textContent = seconds > 0 ? ` again in ${seconds} s ` : " ";
    again.disabled = seconds > 0 || running !== null;
    if (left.isConnected) setTimeout(tick, 250);
  };
  setTimeout(tick);
  shown.append(left, again);
  return shown;
}

function drawAnswer(turn, answer) {
  const said = h("div", { class: "said" }), thinking = h("details", { class: "thinking", hidden: true }, h("summary", {}, "Thinking"), h("div")), below = h("div");
  const box = h("article", { class: "card answer", "aria-busy": "true" }, h("h3", {}, answer.model), thinking, said, below);
  const growing = new Growing(said);
  answer.draw = () => {
    growing.show(answer.text);
    thinking.hidden = !answer.thinking;
    if (thinking.lastChild.textContent.length !== answer.thinking.length) thinking.lastChild.textContent = answer.thinking;
    if (!answer.done) return;
    box.removeAttribute("aria-busy");
    const copied = Object.entries(examples).map(([name, of]) => button(`Copy as ${name}`, (event) => copy(event.target, of(answer.body))));
    below.replaceChildren(...(answer.problem ? [problemOf(turn, answer)] : []), h("div", { class: "facts" }, ...factsOf(answer).map((fact) => h("span", {}, fact))), h("div", { class: "actions" }, button("Copy", (event) => copy(event.target, answer.text)), ...copied));
  };
  answer.draw();
  return box;
}

function draw() {
  $("talk").replaceChildren(...turns.map((turn) => {
    const asked = h("div", { class: "asked" }, turn.prompt, turn.pictures.length ? h("div", { class: "pictures" }, ...turn.pictures.map((src) => h("img", { src, alt: "a picture of yours" }))) : null, h("div", { class: "actions" }));
    turn.actions = asked.lastChild;
    return h("section", { class: "turn" }, asked, h("div", { class: "answers" }, ...turn.answers.map((answer) => drawAnswer(turn, answer))));
  }));
  drawActions();
}

function drawActions() {
  for (const turn of turns) turn.actions.replaceChildren(...(running ? [] : [button("Edit", () => edit(turn)), button("Retry", () => retry(turn))]));
}

function edit(turn) {
  if (running) return;
  $("prompt").value = turn.prompt;
  pictures = turn.pictures;
  drawPictures();
  turns = turns.slice(0, turns.indexOf(turn));
  draw();
  $("prompt").focus();
}

function retry(turn) {
  if (running) return;
  turns = turns.slice(0, turns.indexOf(turn) + 1);
  run(turn);
}

function drawPictures() {
  const away = (src) => { pictures = pictures.filter((one) => one !== src); drawPictures(); $("prompt").focus(); };
  $("pictures").replaceChildren(...pictures.map((src) => h("span", { class: "picture" }, h("img", { src, alt: "a picture to send" }), button("Remove", () => away(src)))));
}

// ── models ──

async function loadModels() {
  const names = (await (await call("GET", "/v1/models")).json()).data.map((model) => model.id);
  const options = () => names.map((name) => h("option", { value: name }, name));
  $("model").replaceChildren(...options());
  $("second").replaceChildren(h("option", { value: "" }, "nothing"), ...options());
  $("embed-model").replaceChildren(...options());
  if (!names.length) throw new Error("This key may use no model that is there.");
  await lookAtModels();
}

async function lookAtModels() {
  const models = () => [$("model").value, $("second").value].filter(Boolean);
  const show = () => { $("add-picture").hidden = !models().some((model) => eyes.get(model)); };
  show();
  for (const model of models()) {
    if (eyes.has(model)) continue;
    try {
      const told = await (await call("POST", "/api/show", { model })).json();
      eyes.set(model, (told.capabilities || []).includes("vision"));
    } catch { /* then it cannot see */ }
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
  const told = await (await call("POST", "/v1/embeddings", { model: $("embed-model").value, input: texts })).json();
  const vectors = told.data.map((one) => one.embedding);
  const head = h("tr", {}, ...["Text", "Length", "First values", "Like the first"].map((name) => h("th", {}, name)));
  const rows = vectors.map((vector, n) => h("tr", {}, h("td", { class: "wide", "data-label": "Text" }, texts[n]), h("td", { class: "number", "data-label": "Length" }, vector.length), h("td", { class: "wide", "data-label": "First values" }, vector.slice(0, 5).map((value) => value.toFixed(4)).join(", ")), h("td", { class: "number", "data-label": "Like the first" }, similarity(vectors[0], vector).toFixed(4))));
  $("vectors").replaceChildren(h("div", { class: "scroll" }, h("table", {}, h("thead", {}, head), h("tbody", {}, ...rows))), h("p", { class: "dim" }, told.usage ? `${told.usage.prompt_tokens} tokens` : ""));
}

// ── the page ──

function say(problem) {
  $("problem").textContent = problem ? problem.message : "";
  $("problem").hidden = !problem;
  if (problem?.status === 401) leave();
}

async function trying(work) {
  try { say(null); await work(); } catch (problem) { say(problem); }
}

function show(tab) {
  for (const name of ["chat", "embed"]) $(name).hidden = name !== tab;
  for (const one of $("tabs").children) one.dataset.tab === tab ? one.setAttribute("aria-current", "page") : one.removeAttribute("aria-current");
}

// What else a header cannot carry.
function readable(text) {
  if (!/^[\x21-\x7e]+$/.test(text)) throw new Error("This is no key: keys have letters, digits and underscores only.");
  return text;
}

async function enter() {
  await loadModels();
  $("enter").hidden = true;
  for (const id of ["tabs", "leave"]) $(id).hidden = false;
  show("chat");
  $("prompt").focus();
}

function leave() {
  key.forget();
  eyes.clear();
  forgetTalk();
  for (const form of ["settings", "say", "embed-form"]) $(form).reset();
  $("vectors").replaceChildren();
  for (const id of ["tabs", "leave", "chat", "embed"]) $(id).hidden = true;
  $("enter").hidden = false;
  $("key").value = "";
  $("key").focus();
}

$("enter").addEventListener("submit", (event) => { event.preventDefault(); trying(async () => { key.set(readable($("key").value.trim())); await enter(); }); });
$("leave").addEventListener("click", leave);
$("tabs").addEventListener("click", (event) => event.target.dataset.tab && show(event.target.dataset.tab));
for (const id of ["model", "second"]) $(id).addEventListener("change", lookAtModels);
$("say").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running || !$("prompt").value.trim()) return;
  const turn = { prompt: $("prompt").value.trim(), pictures, answers: [], actions: null };
  turns.push(turn);
  $("prompt").value = "";
  pictures = [];
  drawPictures();
  run(turn);
});
$("prompt").addEventListener("keydown", (event) => { if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("say").requestSubmit(); } });
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", forgetTalk);
const dataOf = (file) => new Promise((done, failed) => { const reader = new FileReader(); reader.onload = () => done(reader.result); reader.onerror = () => failed(reader.error); reader.readAsDataURL(file); });
$("picture").addEventListener("change", (event) => trying(async () => {
  const files = [...event.target.files], other = files.find((file) => !PICTURES.includes(file.type));
  event.target.value = "";
  if (other) throw new Error(`${other.name} is no picture: add PNG, JPEG, WebP or GIF.`);
  pictures = [...pictures, ...await Promise.all(files.map(dataOf))];
  drawPictures();
}));
$("embed-form").addEventListener("submit", (event) => { event.preventDefault(); trying(embed); });
if (key.get()) trying(enter);
