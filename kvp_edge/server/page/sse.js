// Server-sent events, from pieces of bytes that end anywhere.

/** The data of each event of a response's body; comments (pings) and other fields are left out. */
export async function* eventData(body) {
  const reader = body.getReader();
  const parser = new EventParser();
  let ended = false;
  try {
    for (;;) {
      const { done, value } = await reader.read();
      ended = done;
      if (done) return; // an event without the empty line after it is not complete
      yield* parser.push(value);
    }
  } finally {
    if (!ended) reader.cancel().catch(() => {}); // whoever stops reading stops the reply
  }
}

/** Lines end with LF, CRLF or CR; a CR at the end of one piece and an LF at the start of the next are
 * one end. */
export class EventParser {
  #decoder = new TextDecoder();
  #line = "";
  #data = null;
  #afterReturn = false;

  /** Events that these bytes complete. */
  *push(bytes) {
    let text = this.#decoder.decode(bytes, { stream: true });
    if (text === "") return;
    if (this.#afterReturn && text[0] === "\n") text = text.slice(1);
    this.#afterReturn = text === "" ? false : text.endsWith("\r");
    const lines = (this.#line + text).split(/\r\n|\n|\r/);
    this.#line = lines.pop();
    for (const line of lines) {
      if (line === "") {
        if (this.#data !== null) yield this.#data;
        this.#data = null;
      } else if (line.startsWith("data:")) {
        const value = line.slice(line[5] === " " ? 6 : 5);
        this.#data = this.#data === null ? value : `${this.#data}\n${value}`;
      }
    }
  }
}
