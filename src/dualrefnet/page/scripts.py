"""The page's scripts: what happens in the browser alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

WAITING = '<div class="answer"><p class="waiting">Classifying…</p></div>'
EXPLAINING = '<div class="answer"><p class="waiting">Finding out what mattered…</p></div>'
READY = '<div class="answer"><h2>Answer</h2><p class="small">It will stand here.</p></div>'

# Gradio names the groups of its radio buttons only for the eye, gives every button a group of its own, and offers letters for numbers.
ON_LOAD = """() => {
  const mend = () => {
    document.querySelectorAll("fieldset.choice").forEach((group) => {
      group.setAttribute("aria-label", group.querySelector('[data-testid="block-info"]')?.textContent.trim() ?? "");
      group.setAttribute("role", "radiogroup");
      group.querySelectorAll("input[type=radio]").forEach((button) => { if (button.name !== group.id) button.name = group.id; });
    });
    document.querySelectorAll(".number input, .number textarea").forEach((field) => field.setAttribute("inputmode", "decimal"));
    document.querySelectorAll("#more > button, #rest > button").forEach((button) => {
      const open = button.classList.contains("open");
      if (button.getAttribute("aria-expanded") !== String(open)) button.setAttribute("aria-expanded", String(open));
      button.querySelector(".icon")?.setAttribute("aria-hidden", "true");
    });
    document.querySelectorAll('[data-testid="toast-text"]').forEach((text) => {
      const plain = text.textContent.replace(/^HTTP \\d+: /, "");
      if (text.textContent !== plain) text.textContent = plain;
    });
  };
  mend();
  new MutationObserver(mend).observe(document.body, { childList: true, subtree: true, attributes: true, attributeFilter: ["class"] });
}"""

# The camera of a phone opens where the input of a photograph says that it should; the next choice is free again.
CAMERA = """() => {
  const clear = document.querySelector('#photograph-1 button[aria-label="Clear"]');
  clear?.click();
  setTimeout(() => {
    const input = document.querySelector("#photograph-1 input[type=file]");
    input?.setAttribute("capture", "environment");
    input?.click();
    setTimeout(() => input?.removeAttribute("capture"), 1000);
  }, clear ? 300 : 0);
}"""

# Brought into sight when one asks, and again when the answer has made the page longer.
_LOOK = """const still = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
  setTimeout(() => document.getElementById("told")?.scrollIntoView({ behavior: still ? "auto" : "smooth", block: "start" }), 100);"""

# What is asked is gathered once, so that answer and explanation are of the same photographs and answers.
_GATHER = """(...values) => {
  const names = %s, count = %d, form = {};
  const photographs = values.slice(0, count).filter(Boolean).map((photograph) => photograph.path);
  names.forEach((name, index) => { form[name] = values[count + index]; });
  document.getElementById("told")?.classList.remove("stale");
  %s
  return [JSON.stringify({ photographs, form, time: Date.now() }), %s, ""];
}"""

# An answer that comes after the page was cleared, or asked again, is of another patient: only the answer to what was asked last is shown.
_SHOW_ANSWER = """(asked, of, told, label, answer, explanation) => {
  if (!asked || asked !== of) return [answer, explanation];
  %s
  return [told, label ? %s : ""];
}"""
SHOW_EXPLANATION = """(asked, of, why, explanation) => asked && asked === of ? why : explanation"""

# What was changed since makes an answer old, and the page says so.
STALE = """() => { document.getElementById("told")?.classList.add("stale"); }"""

_FILL = """() => {
  const file = (name) => ({ path: name, url: new URL("gradio_api/file=" + name, document.baseURI).href, orig_name: name,
    mime_type: "image/png", meta: { _type: "gradio.FileData" } });
  const [photographs, values] = %s;
  return [...photographs.map((name) => name && file(name)), ...values, %s, "", ""];
}"""

_LIVE = """element.setAttribute("aria-live", "polite"); element.setAttribute("role", "region"); element.setAttribute("aria-label", %s);"""


def gather(names: Sequence[str], photographs: int) -> str:
    """Return the script that gives what is asked as JSON, the words while one waits, and no explanation yet.

    Args:
        names: of the questions.
        photographs: how many photographs there may be; their components come first.
    """
    return _GATHER % (quoted(list(names)), photographs, _LOOK, quoted(WAITING))


def fill(photographs: Sequence[str | None], values: Sequence[Any]) -> str:
    """Return the script that brings the page to some photographs (or none) and answers, and forgets what was asked."""
    return _FILL % (quoted([list(photographs), list(values)]), quoted(READY))


def show_answer() -> str:
    """Return the script that shows an answer, and that an explanation is on its way, if it is the answer to what was asked last."""
    return _SHOW_ANSWER % (_LOOK, quoted(EXPLAINING))


def live(name: str) -> str:
    """Return the script that makes an element a region whose changes are read aloud."""
    return _LIVE % quoted(name)


def quoted(value: Any) -> str:
    """Write a value as JavaScript, safe within a page."""
    return json.dumps(value).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
