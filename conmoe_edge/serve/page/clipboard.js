// Copies text, also on plain http where browsers have no clipboard API, and says on the button that it did.

export async function copy(text, button) {
  const copied = await toClipboard(text);
  const label = button.textContent;
  if (button.dataset.busy) return;
  button.dataset.busy = "true";
  button.textContent = copied ? "Copied" : "Not copied";
  setTimeout(() => {
    button.textContent = label;
    delete button.dataset.busy;
  }, 1500);
}

async function toClipboard(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch { /* not a secure context, or not allowed */ }
  const field = document.createElement("textarea");
  field.value = text;
  field.className = "off-screen";
  document.body.append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  return done;
}
