// Used by all pages. What models and servers send becomes text or nodes made here, never markup.
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

// The browser's own message for this, "Failed to fetch", does not help the user of a page.
export async function reach(path, options) {
  try { return await fetch(path, options); } catch (problem) {
    throw problem.name === "AbortError" ? problem : new Error("the gateway does not answer: check that it is running, and try again");
  }
}

export async function copy(pressed, text) {
  const label = pressed.dataset.label ||= pressed.textContent;
  let done = true;
  try { await navigator.clipboard.writeText(text); } catch {
    // Without TLS this is the only clipboard that browsers offer; text behind a dialog cannot be selected.
    const box = h("textarea", { "aria-hidden": "true" });
    box.value = text;
    pressed.after(box);
    box.select();
    done = document.execCommand("copy");
    box.remove();
    pressed.focus();
  }
  pressed.textContent = done ? "Copied" : "Copy failed";
  setTimeout(() => { pressed.textContent = label; }, 1500);
}
