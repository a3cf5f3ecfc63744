// What all pages are made of. What comes from models and servers becomes text or nodes made here, never markup.
export const $ = (id) => document.getElementById(id);

export function h(tag, facts = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(facts)) {
    if (name === "on") for (const [event, act] of Object.entries(value)) made.addEventListener(event, act);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  for (const child of children.flat(Infinity)) if (child !== false && child !== null && child !== undefined) made.append(child);
  return made;
}

// A browser's own words for this, "Failed to fetch", say nothing to who only uses a page.
export async function reach(path, options) {
  try { return await fetch(path, options); } catch (problem) {
    throw problem.name === "AbortError" ? problem : new Error("the gateway does not answer: look whether it runs, and try again");
  }
}

export async function copy(pressed, text) {
  const words = pressed.dataset.words ||= pressed.textContent;
  let done = true;
  try { await navigator.clipboard.writeText(text); } catch {
    // Browsers offer pages without TLS no clipboard but this; what a dialog covers cannot be selected.
    const box = h("textarea", { "aria-hidden": "true" });
    box.value = text;
    pressed.after(box);
    box.select();
    done = document.execCommand("copy");
    box.remove();
    pressed.focus();
  }
  pressed.textContent = done ? "Copied" : "Not copied";
  setTimeout(() => { pressed.textContent = words; }, 1500);
}
