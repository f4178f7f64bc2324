"use strict";
// Everything is made of elements and text nodes: no text of the data is ever parsed as HTML.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const SVG = "http://www.w3.org/2000/svg", NOTHING = -32768;
  const other = { in: "out", out: "in" };

  function el(name, attributes, ...children) {
    const svg = name.startsWith("svg:");
    const made = svg ? document.createElementNS(SVG, name.slice(4)) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes || {}))
      if (value === true) made.setAttribute(key, "");
      else if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value);
    made.append(...children.flat().filter((child) => child !== null && child !== undefined));
    return made;
  }
  function decoded(text, Kind) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    return new Kind(bytes.buffer);
  }
  for (const side of Object.values(data.sides)) {
    side.wordNumbers = decoded(side.words, side.wide ? Uint32Array : Uint16Array);
    side.noWord = side.wide ? 0xffffffff : 0xffff;
    side.hundredths = decoded(side.values, Int16Array);
    side.where = decoded(side.places, Int32Array);
  }

  // --- contexts

  function context(side, number, slot) {
    const of = data.sides[side], at = number * of.slots + slot, first = at * data.window;
    const tokens = [];
    for (let k = 0; k < data.window; k++) {
      const word = of.wordNumbers[first + k];
      if (word !== of.noWord)
        tokens.push({ word: data.words[word], value: of.hundredths[first + k], peak: k === data.before });
    }
    if (!tokens.length) return null;
    return { tokens, sequence: of.where[2 * at], position: of.where[2 * at + 1], value: of.hundredths[first + data.before] };
  }
  const sd = (hundredths) => (hundredths < 0 ? "−" : "+") + (Math.abs(hundredths) / 100).toFixed(2);
  function tinted(hundredths) {
    if (hundredths === NOTHING) return null;
    const strength = Math.min(Math.abs(hundredths) / 600, 1) * 0.62;
    return strength < 0.06 ? null : `background:rgba(var(--${hundredths < 0 ? "neg" : "pos"}),${strength.toFixed(2)})`;
  }
  function shownContext(of) {
    if (of === null) return null;
    const where = data.text ? `sequence ${of.sequence}, position ${of.position}` : null;
    const tokens = of.tokens.map((token) => el("span", {
      class: token.peak ? "peak" : null,
      style: tinted(token.value),
      title: token.value === NOTHING ? "not captured" : `${sd(token.value)} standard deviations`,
    }, token.word));
    return el("li", { title: where }, el("span", { class: "value" }, sd(of.value)), el("span", { class: "tokens", dir: "auto" }, tokens));
  }
  function picture(size, bytes, colour, width) {
    const [height, across] = size, canvas = el("canvas", { width: across, height, role: "img" });
    canvas.style.width = `${width}px`;
    canvas.style.height = `${(width * height) / across}px`;
    const drawn = canvas.getContext("2d"), image = drawn.createImageData(across, height);
    for (let i = 0; i < height * across; i++) image.data.set([...colour(bytes[i]), 255], 4 * i);
    drawn.putImageData(image, 0, 0);
    return canvas;
  }
  function thumbnail(of) {
    const bytes = decoded(data.pictures.of[of.sequence], Uint8Array);
    const canvas = picture(data.pictures.size, bytes, (v) => [255 - v, 255 - v, 255 - v], 56);
    canvas.setAttribute("aria-label", of.tokens[0].word);
    return el("li", { title: of.tokens[0].word }, canvas, sd(of.value));
  }
  function contextList(side, number, from, to) {
    const found = [];
    for (let slot = from; slot < to; slot++) found.push(context(side, number, slot));
    const there = found.filter((of) => of !== null);
    if (!there.length) return el("p", { class: "none" }, "No example lies on this side of the mean.");
    if (data.pictures) return el("ul", { class: "grid" }, there.map(thumbnail));
    return el("ol", { class: "contexts" }, there.map(shownContext));
  }

  // --- the card

  const minus = (text) => text.replace("-", "−");
  const narrow = () => matchMedia("(max-width: 820px)").matches;
  function histogram(counts, name) {
    const width = 460, height = 120, bottom = 18, most = Math.max(...counts), bars = [];
    const [low, high] = data.edges, step = width / counts.length;
    counts.forEach((count, i) => {
      if (!count) return;
      const tall = Math.max(1.5, (Math.log1p(count) / Math.log1p(most)) * (height - bottom - 4));
      const middle = low + ((i + 0.5) * (high - low)) / counts.length;
      const bar = el("svg:rect", {
        x: (i * step + 0.5).toFixed(1), y: (height - bottom - tall).toFixed(1), width: (step - 1).toFixed(1), height: tall.toFixed(1),
        style: `fill:rgba(var(--${middle < 0 ? "neg" : "pos"}),0.75)`,
      }, el("svg:title", {}, `${count} at about ${middle.toFixed(1)} standard deviations`));
      bars.push(bar);
    });
    const ticks = [];
    for (let t = low; t <= high; t += 2) {
      const x = ((t - low) / (high - low)) * width;
      ticks.push(el("svg:text", { x, y: height - 4, "text-anchor": t === low ? "start" : t === high ? "end" : "middle" },
        (t === low ? "≤ " : t === high ? "≥ " : "") + minus(`${t}`)));
    }
    return el("svg:svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Histogram of the coordinate of ${name}` },
      el("svg:line", { class: "axis", x1: 0, x2: width, y1: height - bottom, y2: height - bottom }), bars, ticks);
  }
  function signed(of, width) {
    const canvas = picture(of.size, of.values, (v) => {
      const rest = Math.round(255 - Math.abs(v) * 1.9), between = Math.round(255 - Math.abs(v) * 1.1);
      return v < 0 ? [rest, between, 255] : [255, between, rest];
    }, width);
    canvas.setAttribute("aria-label", of.caption);
    return canvas;
  }
  function drawing(of) {
    if (of.size.length === 2) {
      const canvas = signed(of, 180);
      return [canvas, el("p", { class: "note" }, of.caption)];
    }
    const width = 620, height = 130, middle = height / 2, n = of.values.length;
    const point = (v, i) => `${((i / Math.max(n - 1, 1)) * (width - 8) + 4).toFixed(1)},${(middle - v * 0.58).toFixed(1)}`;
    return [el("svg:svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": of.caption },
      el("svg:line", { class: "axis", x1: 0, x2: width, y1: middle, y2: middle }),
      el("svg:polyline", { points: of.values.map(point).join(" "), fill: "none", style: "stroke:rgb(var(--pos));stroke-width:1.8" })),
      el("p", { class: "note" }, of.caption)];
  }
  function bar(effect, size, largest) {
    const share = (Math.abs(effect) / largest) * 50, both = (size / largest) * 50, positive = effect >= 0;
    return el("div", { class: "bar", "aria-hidden": "true" },
      el("i", { class: "size", style: `width:${(2 * both).toFixed(1)}%;left:${(50 - both).toFixed(1)}%` }),
      el("i", { style: `background:rgb(var(--${positive ? "pos" : "neg"}));width:${share.toFixed(1)}%;${positive ? "left:50%" : "right:50%"}` }));
  }
  function partners(side, number) {
    const of = data.sides[side].partners[number];
    const largest = Math.max(...of.map(([, , size]) => parseFloat(size)), 1e-9);
    const rows = of.map(([partner, effect, size, share, often, neurons]) => el("tr", {},
      el("td", {}, link(other[side], partner)),
      el("td", {}, el("div", { class: "effect" }, el("span", {}, minus(effect), el("small", {}, ` rms ${size}`)), bar(parseFloat(effect), parseFloat(size), largest))),
      el("td", { class: "num", "data-head": "share" }, share), el("td", { class: "num", "data-head": "often" }, often),
      el("td", { class: "neurons" }, neurons.map(([neuron, part]) => `${neuron} (${minus(part)})`).join(", "))));
    const heads = [side === "in" ? "output" : "input", "mean effect", "share", "how often", "through neurons (part of the mean)"];
    return el("div", { class: "scroll" }, el("table", {},
      el("thead", {}, el("tr", {}, heads.map((head, i) => el("th", { scope: "col", class: i === 2 || i === 3 ? "num" : null }, head)))),
      el("tbody", {}, rows)));
  }
  const name = (side, number) => `${side === "in" ? "Input" : "Output"} ${number}`;
  const known = (side, number) => number < data.sides[side].facts.length;
  const link = (side, number) =>
    known(side, number) ? el("a", { href: `#${side}-${number}` }, name(side, number)) : name(side, number);

  // The direction in the middle column, its partners, and the further partners of these.
  function neighbourhood(side, number) {
    const near = data.sides[side].partners[number].slice(0, 5), height = 40 + near.length * 44, small = narrow();
    const width = small ? 340 : 620, xs = { own: small ? 50 : 60, partner: small ? 290 : 300, far: 540 }, lines = [], nodes = [];
    const node = (s, n, x, y, own) => {
      const box = el("svg:g", {}, el("svg:rect", { class: own ? "mid" : "node", x: x - 44, y: y - 12, width: 88, height: 24, rx: 12 }),
        el("svg:text", { class: own ? "midtext" : null, x, y: y + 4, "text-anchor": "middle" }, name(s, n)));
      nodes.push(own || !known(s, n) ? box : el("svg:a", { href: `#${s}-${n}` }, box));
    };
    const line = (x1, y1, x2, y2, effect, share) => lines.push(el("svg:path", {
      d: `M${x1},${y1} C${(x1 + x2) / 2},${y1} ${(x1 + x2) / 2},${y2} ${x2},${y2}`, fill: "none",
      style: `stroke:rgba(var(--${effect.startsWith("-") ? "neg" : "pos"}),0.7);stroke-width:${(0.8 + 5 * Math.sqrt(parseFloat(share) / 100)).toFixed(1)}`,
    }, el("svg:title", {}, `mean effect ${minus(effect)}, ${share} of the energy`)));
    const middle = height / 2, far = new Map();
    near.forEach(([partner, effect, , share], i) => {
      const y = 42 + i * 44;
      line(xs.own + 44, middle, xs.partner - 44, y, effect, share);
      if (small || !known(other[side], partner)) return;
      for (const [next, e, , s] of data.sides[other[side]].partners[partner].slice(0, 3))
        if (next !== number && (far.has(next) || far.size < near.length + 1)) {
          if (!far.has(next)) far.set(next, []);
          far.get(next).push([y, e, s]);
        }
    });
    [...far].forEach(([next, from], i) => {
      const y = 24 + (i + 0.5) * ((height - 24) / far.size);
      for (const [y1, effect, share] of from) line(xs.partner + 44, y1, xs.far - 44, y, effect, share);
      node(side, next, xs.far, y, false);
    });
    near.forEach(([partner], i) => node(other[side], partner, xs.partner, 42 + i * 44, false));
    node(side, number, xs.own, middle, true);
    const heads = [[xs.own, ""], [xs.partner, side === "in" ? "moves" : "is moved by"]];
    if (!small) heads.push([xs.far, side === "in" ? "also move these" : "these also move"]);
    return el("svg:svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Directions around ${name(side, number)}` },
      heads.map(([x, text]) => el("svg:text", { x, y: 12, "text-anchor": "middle" }, text)), lines, nodes);
  }
  function wordList(list, kind) {
    return el("ul", { class: "words" }, list.map(([word, score]) => el("li", { class: kind, dir: "auto" }, word, el("small", {}, minus(score)))));
  }
  function wordEnds(scores, positive, small, negative) {
    return el("section", {}, el("div", { class: "two" },
      el("div", {}, el("h4", { class: "pos" }, positive, el("small", {}, small)), wordList(scores[0], "p")),
      el("div", {}, el("h4", { class: "neg" }, negative), wordList(scores[1], "m"))));
  }
  function section(title, small, ...content) {
    return el("section", {}, el("h3", {}, title, small ? el("small", {}, small) : null), content);
  }
  function card(side, number) {
    const of = data.sides[side], facts = of.facts[number], scores = of.scores[number];
    const badge = (text, value) => el("li", {}, text, " ", el("b", {}, value));
    const badges = [badge("influence", facts.influence)];
    if (facts.again !== null)
      badges.push(el("li", { class: facts.again ? "again" : "alone" }, facts.again ? "found again, |cos| " : "not found again, |cos| ", el("b", {}, facts.cosine)));
    badges.push(badge("variance", facts.variance), badge("skewness", minus(facts.skewness)), badge("kurtosis", minus(facts.kurtosis)));
    const what = data.text ? "tokens" : "examples";
    const parts = [
      el("a", { class: "back", href: `#${side}` }, "← all directions"),
      el("h2", {}, name(side, number)),
      el("ul", { class: "badges" }, badges),
    ];
    if (of.drawings) parts.push(el("section", {}, drawing(of.drawings[number])));
    parts.push(el("section", {}, el("div", { class: "two" },
      el("div", {}, el("h4", { class: "pos" }, "Most positive", el("small", {}, `${what}, in standard deviations from the mean`)), contextList(side, number, 0, data.ends)),
      el("div", {}, el("h4", { class: "neg" }, "Most negative"), contextList(side, number, data.ends, 2 * data.ends)))));
    parts.push(el("section", {}, el("details", {}, el("summary", {}, "In between: the examples at the 99th to the 1st percentile"),
      contextList(side, number, 2 * data.ends, of.slots))));
    const over = "standard deviations over the vocabulary";
    if (scores && side === "in") parts.push(wordEnds(scores, "Embeddings at its positive end", over, "Embeddings at its negative end"));
    if (scores && side === "out") parts.push(wordEnds(scores, "Promotes, directly", over, "Suppresses, directly"));
    if (of.through[number]) parts.push(wordEnds(of.through[number], "Promotes, through the layers behind", over, "Suppresses, through the layers behind"));
    parts.push(section(side === "in" ? "What it moves" : "What moves it", null, partners(side, number),
      el("p", { class: "note" }, `Mean effect: how many of its standard deviations the output moves for one of the input, over ${data.jacobians} held-out examples; rms (pale bar): the root mean square, far above the mean where the sign differs between examples. Share: of this direction's mean squared Jacobian. How often: share of examples with an entry above a tenth of the rms. The parts of all neurons add up to the effect.`)));
    parts.push(el("div", { class: "two" },
      section("Neighbourhood", null, neighbourhood(side, number)),
      section("Distribution", `${data.examples}, logarithmic`, histogram(of.histograms[number], name(side, number)))));
    parts.push(el("p", { class: "keys" }, el("kbd", {}, "j"), " ", el("kbd", {}, "k"), " next and previous, ", el("kbd", {}, "/"), " search, ", el("kbd", {}, "s"), " the other side, ", el("kbd", {}, "g"), " the graph"));
    return parts;
  }

  // --- the graph

  function graph() {
    const of = data.graph, [width, height] = of.size, small = 90;
    const captioned = (side, number) => {
      const drawings = data.sides[side].drawings;
      return drawings && known(side, number) && drawings[number].size.length === 1 ? el("small", {}, ` (${drawings[number].caption.split(":")[0]})`) : null;
    };
    const lines = of.curves.map(([d, thick, kind, about]) =>
      el("svg:path", { class: kind, d, "stroke-width": thick }, el("svg:title", {}, about)));
    const nodes = of.dots.map(([side, number, x, y, r, about]) => {
      const left = side === "in", drawn = [el("svg:rect", { class: "hit", x: left ? x - 34 : x - 8, y: y - 7, width: 42, height: 14 }), el("svg:circle", { cx: x, cy: y, r }, el("svg:title", {}, about)),
        el("svg:text", { x: left ? x - r - 4 : x + r + 4, y: y + 3.5, "text-anchor": left ? "end" : "start" }, String(number))];
      return known(side, number) ? el("svg:a", { href: `#${side}-${number}`, "aria-label": name(side, number) }, drawn) : el("svg:g", {}, drawn);
    });
    const kinds = new Set(of.curves.map(([, , kind]) => kind));
    const legend = of.legend.filter(([kind]) => kinds.has(kind)).map(([kind, said]) => el("li", { class: kind }, said));
    const modules = of.modules.filter((group) => group.length > 1).map((group, i) => el("li", {}, el("b", {}, `Module ${i}`),
      group.slice(0, small).flatMap(([side, number]) => [" ", link(side, number), captioned(side, number)]), group.length > small ? ` and ${group.length - small} more` : null));
    return [
      el("a", { class: "back", href: "#in" }, "← all directions"),
      el("h2", {}, "The graph"),
      el("p", { class: "note" }, of.said.map((said) => `${minus(said)}. `)),
      el("div", { class: "scroll" }, el("svg:svg", { class: "graph", viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": "Graph of the directions" },
        of.titles.map(([title, x]) => el("svg:text", { class: "strong", x, y: 14, "text-anchor": "middle" }, title)), lines, nodes)),
      el("ul", { class: "legend" }, legend),
      section("Modules", "groups with more weight between them than with the rest", el("ol", { class: "modules" }, modules),
        el("p", { class: "note" }, "Any graph has some modularity. Rewired: edges exchange their targets, and every direction keeps its number of edges; a modularity above that says that it is no chance which directions are joined. Reweighted: the edges stay, and their weights are permuted; above that, it is no chance how strongly they are joined.")),
    ];
  }

  // --- the list

  const state = { side: "in", number: null, query: "", again: false };
  const rows = el("ul", { id: "rows" }), count = el("output", { "aria-live": "polite" });
  const search = el("input", { type: "search", placeholder: data.text ? "Search words or a number" : "Search examples or a number", "aria-label": "Search directions" });
  const again = el("input", { type: "checkbox" });
  const buttons = Object.fromEntries(Object.keys(data.sides).map((side) => [side,
    el("button", { type: "button" }, side === "in" ? "Inputs" : "Outputs", ` ${data.sides[side].count}`)]));
  const graphButton = el("button", { type: "button", class: "show" }, "Graph");
  const haystacks = {};
  function haystack(side, number) {
    const key = `${side}-${number}`;
    if (!(key in haystacks)) {
      const of = data.sides[side], words = [];
      for (let slot = 0; slot < 2 * data.ends; slot++) {
        const found = context(side, number, slot);
        if (found) words.push(...found.tokens.filter((token) => token.peak).map((token) => token.word));
      }
      for (const end of [...(of.scores[number] || []), ...(of.through[number] || [])]) words.push(...end.map(([word]) => word));
      if (of.drawings) words.push(of.drawings[number].caption);
      haystacks[key] = words.join("\n").toLowerCase();
    }
    return haystacks[key];
  }
  function matching() {
    const of = data.sides[state.side], query = state.query.trim().toLowerCase(), found = [];
    of.facts.forEach((facts, number) => {
      if (state.again && !facts.again) return;
      if (query === String(number)) found.unshift(number);
      else if (!query || haystack(state.side, number).includes(query)) found.push(number);
    });
    return found;
  }
  function peek(side, number) {
    const of = data.sides[side];
    if (of.drawings && of.drawings[number].size.length === 1) return el("span", { class: "caption" }, of.drawings[number].caption.split(":")[0]);
    if (of.drawings) return signed(of.drawings[number], 26);
    const ends = [["p", context(side, number, 0)], ["m", context(side, number, data.ends)]];
    return ends.map(([kind, found]) => found && el("span", { class: kind }, found.tokens.find((token) => token.peak).word));
  }
  function list() {
    const of = data.sides[state.side], found = matching(), most = Math.max(...of.facts.map((facts) => parseFloat(facts.influence))) || 1;
    rows.replaceChildren(...found.map((number) => {
      const facts = of.facts[number], mark = facts.again === null ? "" : facts.again ? "again" : "alone";
      const width = Math.max(2, (parseFloat(facts.influence) / most) * 100);
      return el("li", {}, el("a", {
        href: `#${state.side}-${number}`, "data-number": number, "aria-current": number === state.number ? "true" : null,
        "aria-label": `${name(state.side, number)}, influence ${facts.influence}${mark === "again" ? ", found again" : mark ? ", not found again" : ""}`,
      }, el("span", { class: `n ${mark}` }, String(number)), el("span", { class: "peek" }, peek(state.side, number)),
        el("span", { class: "share" }, facts.influence, el("i", { style: `width:${width.toFixed(0)}%` }))));
    }));
    const hidden = of.count - of.facts.length;
    count.textContent = found.length === of.facts.length && !hidden ? "Sorted by influence" : `${found.length} of ${of.count}` + (hidden ? ` (cards for the ${of.facts.length} strongest)` : "");
    for (const [side, button] of Object.entries(buttons)) button.setAttribute("aria-pressed", String(side === state.side));
  }
  function current() {
    for (const link of rows.querySelectorAll("a")) {
      const chosen = Number(link.dataset.number) === state.number;
      if (chosen) link.setAttribute("aria-current", "true"); else link.removeAttribute("aria-current");
      if (chosen && getComputedStyle(rows).overflowY === "auto") {
        const place = link.getBoundingClientRect(), frame = rows.getBoundingClientRect();
        if (place.top < frame.top || place.bottom > frame.bottom) rows.scrollTop += place.top - frame.top - frame.height / 3;
      }
    }
  }

  // --- what is shown follows the address, so that back and links work

  let listed = "", shown = null;
  function go(address) {
    location.hash = address;
    show(); // at once, and not when the browser says so: keys come faster
  }
  function show() {
    if (shown === location.hash) return;
    shown = location.hash;
    const [side, number] = location.hash.slice(1).split("-"), drawn = location.hash === "#graph";
    state.side = side in data.sides ? side : "in";
    const asked = number !== undefined && /^\d+$/.test(number) && known(state.side, Number(number));
    state.number = asked ? Number(number) : narrow() ? null : matching()[0] ?? null;
    if (drawn) state.number = null;
    document.body.classList.toggle("open", asked || drawn);
    graphButton.setAttribute("aria-pressed", String(drawn));
    if (listed !== state.side) { list(); listed = state.side; } else current();
    const place = document.getElementById("card");
    place.replaceChildren(...(drawn ? graph() : state.number === null ? [el("p", { class: "none" }, "Choose a direction.")] : card(state.side, state.number)));
    if (drawn) document.title = `The graph · ${data.title}`;
    if (asked) { document.title = `${name(state.side, state.number)} · ${data.title}`; window.scrollTo(0, narrow() ? 0 : Math.min(window.scrollY, place.offsetTop)); }
    current();
  }
  function step(by) {
    const found = matching(), at = found.indexOf(state.number), next = found[at < 0 ? 0 : at + by];
    if (next !== undefined) go(`${state.side}-${next}`);
  }
  search.addEventListener("input", () => { state.query = search.value; list(); });
  again.addEventListener("change", () => { state.again = again.checked; list(); });
  for (const [side, button] of Object.entries(buttons)) button.addEventListener("click", () => go(side));
  graphButton.addEventListener("click", () => go("graph"));
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    show(); // the address may have changed a moment ago
    if (event.target === search) {
      if (event.key === "Escape") { search.value = state.query = ""; list(); search.blur(); }
      if (event.key === "Enter") { const first = matching()[0]; if (first !== undefined) go(`${state.side}-${first}`); }
      return;
    }
    const does = { j: () => step(1), k: () => step(-1), s: () => go(other[state.side]), g: () => go("graph"), "/": () => search.focus() }[event.key];
    if (does) { event.preventDefault(); does(); }
  });
  window.addEventListener("hashchange", show);

  const [finding, ...remarks] = data.verdict;
  document.getElementById("head").append(
    el("h1", {}, data.title),
    finding ? el("p", { class: "lead" }, el("b", {}, finding)) : "",
    ...data.missing.map((said) => el("p", { class: "warn" }, said)),
    el("details", {}, el("summary", {}, "About this layer and its fit"), remarks.map((remark) => el("p", {}, remark)),
      el("dl", { class: "facts" }, data.facts.map(([key, value]) => [el("dt", {}, key), el("dd", {}, value)])),
      el("p", {}, data.links.map(([text, address], i) => [i ? " · " : null, el("a", { href: address }, text)]))));
  const filter = Object.values(data.sides).some((side) => side.facts.some((facts) => facts.again !== null));
  document.getElementById("list").append(
    el("div", { class: "tools" }, el("div", { class: "sides", role: "group", "aria-label": "Side of the layer" }, Object.values(buttons)), graphButton,
      search, filter ? el("label", {}, again, "found again by every start") : "", count), rows);
  show();
})();
