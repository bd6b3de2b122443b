// The little of Markdown that replies are written in, as elements: paragraphs, headings, lists, code,
// bold and italic words. Everything else stays the text that it is; nothing becomes markup.

import { iconButton, icon, make } from "./dom.js";

/** Render `text` into `place`. Blocks that were there before and have not changed are left alone, so
 * that a reply can grow without its beginning being built again. */
export function render(place, text) {
  const old = place.blocks ?? [];
  const blocks = split(text);
  let same = 0;
  while (same < old.length && same < blocks.length && old[same].source === blocks[same].source) same++;
  while (place.childNodes.length > same) place.lastChild.remove();
  for (const block of blocks.slice(same)) place.append(element(block));
  place.blocks = blocks;
}

const FENCE = /^(\s*)(`{3,}|~{3,})\s*([^`\s]*)[^`]*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/;

/** Blocks of lines: {kind, lines, source, ...}. */
export function split(text) {
  const blocks = [];
  let block = null;
  const begin = (kind, more = {}) => {
    block = { kind, lines: [], source: `${kind}\n`, ...more };
    blocks.push(block);
  };
  for (const line of text.split(/\r\n|\n|\r/)) {
    if (block?.fence) {
      block.source += `${line}\n`;
      const end = line.trim();
      if (end.startsWith(block.fence) && end === end[0].repeat(end.length)) block = null;
      else block.lines.push(line.startsWith(block.indent) ? line.slice(block.indent.length) : line);
      continue;
    }
    const fence = FENCE.exec(line), item = ITEM.exec(line), heading = HEADING.exec(line);
    if (line.trim() === "") {
      if (block?.kind === "list") block.source += "\n"; // its items may go on after an empty line
      else block = null;
      continue;
    }
    if (fence) begin("code", { indent: fence[1], fence: fence[2], language: fence[3] });
    else if (heading) { begin("heading"); block.lines.push(heading[2]); }
    else if (item) {
      if (block?.kind !== "list") begin("list");
      block.lines.push({ depth: item[1].replaceAll("\t", "    ").length, mark: item[2], text: item[3] });
    } else if (block?.kind === "list" && (/^\s/.test(line) || !block.source.endsWith("\n\n"))) {
      block.lines.at(-1).text += `\n${line.trim()}`;
    } else {
      if (block?.kind !== "paragraph") begin("paragraph");
      block.lines.push(line);
    }
    block.source += `${line}\n`;
    if (heading) block = null;
  }
  return blocks;
}

function element(block) {
  if (block.kind === "code") return code(block);
  if (block.kind === "list") return list(block.lines);
  if (block.kind === "heading") return make("p", { className: "heading" }, ...inline(block.lines[0]));
  return make("p", {}, ...inline(block.lines.join("\n")));
}

function code({ lines, language }) {
  const text = lines.join("\n");
  return make("div", { className: "code" },
    make("div", { className: "bar" }, make("span", {}, language || "code"), copyButton(() => text, "Copy the code")),
    make("pre", { tabIndex: 0 }, make("code", {}, text)));
}

/** Lists in lists by how far their items are indented. */
function list(items) {
  const open = []; // the lists around the item, outermost first
  let outermost = null;
  for (const { depth, mark, text } of items) {
    while (open.length > 1 && depth < open.at(-1).depth) open.pop();
    if (open.length === 0 || depth >= open.at(-1).depth + 2) {
      const ordered = /\d/.test(mark);
      const made = make(ordered ? "ol" : "ul");
      if (ordered) made.start = parseInt(mark, 10);
      if (open.length) open.at(-1).list.lastChild.append(made);
      outermost ??= made;
      open.push({ depth, list: made });
    }
    open.at(-1).list.append(make("li", {}, ...inline(text)));
  }
  return outermost;
}

const INLINE = /(`+)(?!`)(.+?)(?<!`)\1(?!`)|\*\*(?=\S)(.+?)(?<=\S)\*\*|(?<![*\w])\*(?=[^\s*])([^*\n]+?)(?<=\S)\*(?![*\w])/gs;

/** Text and elements of one paragraph. */
function inline(text) {
  const parts = [];
  let last = 0;
  for (const match of text.matchAll(INLINE)) {
    parts.push(text.slice(last, match.index));
    const [, , inCode, bold, italic] = match;
    if (inCode !== undefined) parts.push(make("code", {}, inCode.replace(/^ (.*\S.*) $/s, "$1")));
    else if (bold !== undefined) parts.push(make("strong", {}, ...inline(bold)));
    else parts.push(make("em", {}, ...inline(italic)));
    last = match.index + match[0].length;
  }
  parts.push(text.slice(last));
  return parts.filter((part) => part !== "");
}

/** A button that copies what `text` gives, and says so. */
export function copyButton(text, label) {
  const button = iconButton("copy", label, async () => {
    await toClipboard(text());
    button.replaceChildren(icon("done"));
    button.ariaLabel = "Copied";
    setTimeout(() => {
      button.replaceChildren(icon("copy"));
      button.ariaLabel = label;
    }, 1500);
  });
  return button;
}

async function toClipboard(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  // over plain http from another machine there is no clipboard object
  const area = make("textarea", { value: text, className: "hidden" });
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}
