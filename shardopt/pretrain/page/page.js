// Zoom, hover and axes of the curves. Without it the page shows the images that drawing.py has made.
"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const LEAST_DRAG = 8;       // pixels; less is a click

  const data = JSON.parse(document.getElementById("data-of-curves").textContent);
  const element = (id) => document.getElementById(id);
  const images = [...document.querySelectorAll("svg[data-panel]")];
  const shown = data.runs.map((_, run) => element(`show-${run}`));
  const tip = element("tip");
  if (!images.length) return;
  // Margins are those of the images as they come.
  const number = (node, name) => Number(node.getAttribute(name)), inner = images[0].querySelector(".inner");
  const { width: WIDTH, height: HEIGHT } = images[0].viewBox.baseVal;
  const LEFT = number(inner, "x"), TOP = number(inner, "y");
  const RIGHT = WIDTH - LEFT - number(inner, "width"), BOTTOM = HEIGHT - TOP - number(inner, "height");
  document.querySelector(".controls").hidden = false;

  // What the reader has chosen, which the page's address keeps: #over=tokens&log=xy&zoom=100-200&hide=1,2
  const choice = { over: "step", logX: false, logY: false, zoom: null };

  // ---------------------------------------------------------------- numbers

  function tokensAt(run, step) {
    const knots = data.runs[run].tokens;
    let high = knots.findIndex(([at]) => at >= step);
    if (high < 0) high = knots.length - 1;
    if (high < 1) return knots.length ? knots[0][1] : 0;
    const [[s0, t0], [s1, t1]] = [knots[high - 1], knots[high]];
    return t0 + (t1 - t0) * (step - s0) / (s1 - s0);
  }

  for (const panel of data.panels)
    for (const one of panel.series) one.tokens = one.x.map((step) => tokensAt(one.run, step));

  const placesOf = (one) => (choice.over === "tokens" ? one.tokens : one.x);

  function ticks(low, high, most) {
    const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((size) => size * power).find((size) => size >= rough * (1 - 1e-9));
    const numbers = [];
    for (let n = Math.ceil(low / step - 1e-9); n <= Math.floor(high / step + 1e-9); n++) numbers.push(n * step);
    return numbers;
  }

  function logTicks(low, high) {
    const numbers = [], decades = Math.log10(high / low), every = Math.ceil(decades / 6);
    for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power++)
      for (const size of decades < 1.2 ? [1, 2, 3, 5, 7] : decades < 3 ? [1, 2, 5] : [1])
        if (size * 10 ** power >= low && size * 10 ** power <= high && power % every === 0) numbers.push(size * 10 ** power);
    return numbers.length > 1 ? numbers : ticks(low, high, 4);
  }

  function label(number, digits = 4) {
    for (const [size, name] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]])
      if (Math.abs(number) >= size && (size > 1e3 || Math.abs(number) >= 1e4))
        return `${Number((number / size).toPrecision(digits))}${name}`;
    if (number === 0 || Math.abs(number) >= 1e-3) return `${Number(number.toPrecision(digits))}`;
    const [mantissa, exponent] = number.toExponential(digits - 1).split("e");
    return `${Number(mantissa)}e${exponent}`;
  }

  // See labels in drawing.py.
  function labels(numbers) {
    const steps = numbers.slice(1).map((number, i) => Math.abs(number - numbers[i]));
    const largest = Math.max(0, ...numbers.map(Math.abs));
    const digits = steps.length ? Math.max(4, Math.ceil(Math.log10(largest / Math.min(...steps)) + 1)) : 4;
    const texts = numbers.map((number) => label(number, digits));
    if (texts.every((text) => text.length - (text.match(/[.-]/g) || []).length / 2 <= data.most_digits)) return [texts, ""];
    return [numbers.map((number) => label(number - numbers[0])), label(numbers[0], digits)];
  }

  function scale(low, high, length, log) {
    const by = log ? Math.log : (x) => x, back = log ? Math.exp : (x) => x;
    const [a, b] = [by(low), by(high)];
    return { low, high, to: (x) => (by(x) - a) / (b - a) * length, from: (at) => back(a + at / length * (b - a)),
             ticks: (most) => (log ? logTicks(low, high) : ticks(low, high, most)) };
  }

  const spread = (low, high) => (high > low ? [low, high] : [low - (Math.abs(low) || 1) / 10, high + (Math.abs(high) || 1) / 10]);

  // ---------------------------------------------------------------- axes

  const visible = (panel) => panel.series.filter((one) => shown[one.run].checked);

  function rangeX(panel) {
    if (choice.zoom) return choice.zoom;
    if (choice.over === "step" && !choice.logX) return panel.view.slice(0, 2);
    let low = Infinity, high = -Infinity;
    for (const one of panel.series)
      for (const x of placesOf(one))
        if (x > 0 || !choice.logX) { low = Math.min(low, x); high = Math.max(high, x); }
    return low <= high ? spread(low, high) : [1, 10];
  }

  function rangeY(panel, x0, x1) {
    if (!choice.zoom && !choice.logY) return panel.view.slice(2);
    let low = Infinity, high = -Infinity;
    for (const one of visible(panel))
      placesOf(one).forEach((x, i) => {
        const y = one.y[i];
        if (y !== null && x >= x0 && x <= x1 && (y > 0 || !choice.logY)) { low = Math.min(low, y); high = Math.max(high, y); }
      });
    if (low > high) return choice.logY ? [1, 10] : panel.view.slice(2);
    if (choice.logY) return low < high ? [low / (high / low) ** 0.04, high * (high / low) ** 0.04] : [low / 2, high * 2];
    const [bottom, top] = spread(low, high), margin = 0.05 * (top - bottom);
    return [bottom - margin, top + margin];
  }

  // ---------------------------------------------------------------- drawing

  function add(parent, tag, attributes, text) {
    const node = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text !== undefined) node.textContent = text;
    parent.append(node);
    return node;
  }

  function draw(image, width = Math.round(image.clientWidth)) {
    const panel = data.panels[image.dataset.panel];
    if (!width) return;   // in a part that is folded
    const box = [width - LEFT - RIGHT, HEIGHT - TOP - BOTTOM];
    const [x0, x1] = rangeX(panel), [y0, y1] = rangeY(panel, x0, x1);
    const x = scale(x0, x1, box[0], choice.logX && x0 > 0), y = scale(y1, y0, box[1], choice.logY);
    image.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    image.replaceChildren();
    image.scales = { x, y };
    const yTicks = choice.logY ? logTicks(y0, y1) : ticks(y0, y1, 6), [texts, offset] = labels(yTicks);
    yTicks.forEach((tick, i) => {
      const at = (TOP + y.to(tick)).toFixed(1);
      add(image, "path", { class: "grid", d: `M${LEFT} ${at}h${box[0]}` });
      add(image, "text", { x: LEFT - 6, y: Number(at) + 4, "text-anchor": "end" }, texts[i]);
    });
    if (offset) add(image, "text", { class: "offset", x: LEFT + 6, y: TOP + 12 }, `+ ${offset}`);
    let free = 0;
    for (const tick of x.ticks(width < 420 ? 4 : 6)) {
      const at = LEFT + x.to(tick), text = label(tick, 6), half = 4 * text.length;
      if (at - half < free) continue;
      free = at + half;
      add(image, "text", { x: Math.min(at, width - half), y: HEIGHT - 8, "text-anchor": "middle" }, text);
    }
    const plot = add(image, "svg", { class: "inner", x: LEFT, y: TOP, width: box[0], height: box[1] });
    for (const one of panel.series) {
      const group = add(plot, "g", { class: `r${one.run}${one.raw ? " raw" : ""}` });
      let path = "", dots = "", pen = "M", inside = 0;
      placesOf(one).forEach((place, i) => {
        const value = one.y[i];
        if (value === null || (choice.logX && place <= 0) || (choice.logY && value <= 0)) { pen = "M"; return; }
        const at = `${x.to(place).toFixed(1)} ${y.to(value).toFixed(1)}`;
        path += pen + at;
        pen = "L";
        if (place >= x0 && place <= x1) { inside += 1; dots += `M${at}h0`; }
      });
      add(group, "path", { class: "line", d: path });
      if (inside <= data.dots && !one.raw) add(group, "path", { class: "dots", d: dots });
    }
    if (panel.key === "loss")
      for (const mark of data.marks) {
        const place = choice.over === "tokens" ? tokensAt(mark.run, mark.step) : mark.step;
        if (place < x0 || place > x1) continue;
        const d = `M${x.to(place).toFixed(1)} ${box[1] - 9}l5 9h-10z`;
        add(add(plot, "path", { class: `mark r${mark.run}`, d }), "title", {}, mark.text);
      }
  }

  function drawAll() {
    for (const image of images) draw(image);
    element("over").value = choice.over;
    element("log-x").checked = choice.logX;
    element("log-y").checked = choice.logY;
    element("whole").disabled = !choice.zoom;
  }

  // ---------------------------------------------------------------- the reader's choice

  function readAddress() {
    const given = new URLSearchParams(location.hash.slice(1));
    const hidden = new Set((given.get("hide") || "").split(",").filter(Boolean).map(Number));
    const zoom = (given.get("zoom") || "").match(/^([\d.e+]+)-([\d.e+]+)$/);
    choice.over = given.get("over") === "tokens" ? "tokens" : "step";
    choice.logX = (given.get("log") || "").includes("x");
    choice.logY = (given.get("log") || "").includes("y");
    choice.zoom = zoom && Number(zoom[1]) < Number(zoom[2]) ? [Number(zoom[1]), Number(zoom[2])] : null;
    shown.forEach((box, run) => { box.checked = !hidden.has(run); });
    drawAll();
  }

  function changed() {
    const parts = [], log = (choice.logX ? "x" : "") + (choice.logY ? "y" : "");
    const hidden = shown.flatMap((box, run) => (box.checked ? [] : [run]));
    if (choice.over !== "step") parts.push(`over=${choice.over}`);
    if (log) parts.push(`log=${log}`);
    if (choice.zoom) parts.push(`zoom=${choice.zoom.map((x) => Number(x.toPrecision(6))).join("-")}`);
    if (hidden.length) parts.push(`hide=${hidden.join(",")}`);
    history.replaceState(null, "", parts.length ? `#${parts.join("&")}` : location.pathname + location.search);
    drawAll();
  }

  element("over").addEventListener("change", (event) => {
    choice.over = event.target.value;
    choice.zoom = null;   // it was in the other unit
    changed();
  });
  element("log-x").addEventListener("change", (event) => { choice.logX = event.target.checked; changed(); });
  element("log-y").addEventListener("change", (event) => { choice.logY = event.target.checked; changed(); });
  element("whole").addEventListener("click", () => { choice.zoom = null; changed(); });
  for (const box of shown) box.addEventListener("change", changed);
  for (const part of document.querySelectorAll("details"))
    part.addEventListener("toggle", () => part.querySelectorAll("svg[data-panel]").forEach((image) => draw(image)));
  addEventListener("hashchange", readAddress);
  addEventListener("beforeprint", () => { for (const image of images) draw(image, WIDTH); });   // folded ones, too
  addEventListener("afterprint", drawAll);
  let resizing;
  addEventListener("resize", () => { cancelAnimationFrame(resizing); resizing = requestAnimationFrame(drawAll); });

  // ---------------------------------------------------------------- pointer: hover, and drag to zoom

  const within = (image, event) => {
    const width = image.clientWidth - LEFT - RIGHT;
    return Math.max(0, Math.min(width, event.clientX - image.getBoundingClientRect().left - LEFT));
  };

  function mark(image, from, to) {
    image.querySelector(".cross, .drawn")?.remove();
    if (from === null) return;
    const height = HEIGHT - TOP - BOTTOM;
    if (to === undefined) add(image, "path", { class: "cross", d: `M${LEFT + from} ${TOP}v${height}` });
    else add(image, "rect", { class: "drawn", x: LEFT + Math.min(from, to), y: TOP, width: Math.abs(to - from), height });
  }

  function hover(image, event) {
    const panel = data.panels[image.dataset.panel], at = within(image, event), lines = [];
    const place = image.scales.x.from(at);
    const many = shown.filter((box) => box.checked).length > 1;
    for (const one of visible(panel)) {
      if (one.raw && many) continue;
      const places = placesOf(one);
      let near = -1;
      places.forEach((x, i) => {
        if (one.y[i] !== null && (near < 0 || Math.abs(x - place) < Math.abs(places[near] - place))) near = i;
      });
      if (near >= 0) lines.push([one, places[near], one.y[near]]);
    }
    mark(image, at);
    tip.replaceChildren(...lines.map(([one, x, y]) => {
      const line = document.createElement("div"), name = document.createElement("span");
      name.className = `run r${one.run}`;
      name.append(document.createElement("i"), one.raw ? `${data.runs[one.run].name}, as logged` : data.runs[one.run].name);
      line.append(name, ` ${Number(y.toPrecision(5))} at ${label(x, 6)}`);
      return line;
    }));
    tip.hidden = !lines.length;
    const box = tip.getBoundingClientRect(), right = event.clientX + 14 + box.width < innerWidth;
    tip.style.left = `${Math.max(4, right ? event.clientX + 14 : event.clientX - 14 - box.width)}px`;
    tip.style.top = `${Math.max(4, Math.min(event.clientY + 14, innerHeight - box.height - 4))}px`;
  }

  for (const image of images) {
    let from = null;
    image.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || !image.scales) return;
      from = within(image, event);
      image.setPointerCapture?.(event.pointerId);
    });
    image.addEventListener("pointermove", (event) => {
      if (!image.scales) return;
      if (from === null) hover(image, event);
      else { tip.hidden = true; mark(image, from, within(image, event)); }
    });
    image.addEventListener("pointerup", (event) => {
      if (from === null) return;
      const to = within(image, event), start = from;
      from = null;
      mark(image, null);
      if (Math.abs(to - start) < LEAST_DRAG) return;
      choice.zoom = [start, to].map(image.scales.x.from).sort((a, b) => a - b);
      changed();
    });
    for (const name of ["pointerleave", "pointercancel"])
      image.addEventListener(name, () => { from = null; tip.hidden = true; mark(image, null); });
    image.addEventListener("dblclick", () => { choice.zoom = null; changed(); });
  }
  addEventListener("keydown", (event) => { if (event.key === "Escape" && choice.zoom) { choice.zoom = null; changed(); } });

  readAddress();
})();
