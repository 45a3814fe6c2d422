"""The page for people: drop a photo, see its classes and where the network looked."""

from collections.abc import Mapping
from typing import Any

from maxmap.page import document, escaped

# Of the page: it loads nothing from elsewhere.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src blob:; connect-src 'self'; "
    "frame-ancestors 'none'"
)

_STYLE = """
label { display: block; padding: 2.5rem 1rem; border: 2px dashed var(--line); text-align: center; cursor: pointer }
label.over { border-color: var(--bar) }
input { position: absolute; opacity: 0 } input:focus + span { outline: 2px solid }
img[hidden] { display: none }
#seen { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0 }
#seen img { width: min(16rem, calc(50% - .5rem)); object-fit: contain }
#classes div { margin: .3rem 0 } #said { min-height: 1.5rem }
"""

_SCRIPT = """
const find = name => document.getElementById(name);
let turn = 0;
async function ask(path, file) {
  const answer = await fetch(path, { method: "POST", body: file });
  if (!answer.ok) throw new Error((await answer.json()).error);
  return answer;
}
function show(image, blob) {
  if (image.src) URL.revokeObjectURL(image.src);
  image.src = URL.createObjectURL(blob);
  image.hidden = false;
}
async function send(file) {
  const mine = ++turn, said = find("said"), list = find("classes"), heat = find("heat");
  list.replaceChildren();
  if (heat) heat.hidden = true;
  show(find("photo"), file);
  said.textContent = "...";
  try {
    const found = (await (await ask("predict", file)).json()).classes;
    if (mine != turn) return;
    for (const each of found) {
      const row = document.createElement("div"), bar = document.createElement("div");
      const name = each.words ? `${each.words.split(", ")[0]} (${each.class})` : each.class;
      row.textContent = `${name}: ${(100 * each.probability).toFixed(1)} %`;
      bar.className = "bar";
      bar.style.width = `${100 * each.probability}%`;
      row.append(bar);
      list.append(row);
    }
    said.textContent = "";
    if (!heat) return;
    const seen = await (await ask(`explain?class=${encodeURIComponent(found[0].class)}`, file)).blob();
    if (mine == turn) show(heat, seen);
  } catch (error) {
    if (mine == turn) said.textContent = error.message;
  }
}
const zone = find("zone");
find("photo").addEventListener("error", event => { event.target.hidden = true; });
find("address").textContent = new URL("predict", location);
find("file").addEventListener("change", event => { if (event.target.files[0]) send(event.target.files[0]); });
for (const kind of ["dragover", "dragleave", "drop"])
  zone.addEventListener(kind, event => { event.preventDefault(); zone.classList.toggle("over", kind == "dragover"); });
zone.addEventListener("drop", event => { if (event.dataTransfer.files[0]) send(event.dataTransfer.files[0]); });
"""


def draw(info: Mapping[str, Any], most_bytes: int, *, explained: bool) -> str:
    """Returns the page.

    Args:
      info: what the checkpoint says of itself.
      most_bytes: of an image file.
      explained: whether the server has `/explain`.
    """
    name = info["model"]["name"]
    heat = '<img id="heat" alt="where the network looked" title="where the network looked" hidden>' if explained else ""
    body = (
        f"<h1>{escaped(name)}</h1>\n<p>{len(info['classes']):,} classes, step {info['step']:,}</p>\n"
        '<label id="zone"><input id="file" type="file" accept="image/*,.npy">'
        f"<span>Drop a photo here, or choose one (at most {most_bytes / 1e6:g} MB)</span></label>\n"
        f'<p id="said" role="status"></p><div id="seen"><img id="photo" alt="the photo" hidden>{heat}</div>\n'
        f'<div id="classes"></div>\n<p class="note">curl --data-binary @photo.jpg <span id="address"></span></p>'
        f"<script>{_SCRIPT}</script>"
    )
    return document(name, body, _STYLE)
