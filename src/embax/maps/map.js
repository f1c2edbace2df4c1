
"use strict";
(() => {
  const { tokens, points, nearest } = JSON.parse(document.getElementById("data").textContent);
  const element = (id) => document.getElementById(id);
  const canvas = element("map"), card = element("card"), search = element("search"), answer = element("answer");
  const pen = canvas.getContext("2d");
  const FONT = "13px system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif", HEIGHT = 16, MARGIN = 80, REACH = 14;
  const rowOf = new Map();
  tokens.forEach((token, row) => { if (!rowOf.has(token)) rowOf.set(token, row); });
  const view = { x: 0, y: 0, zoom: 1 };  // the place in the middle, and how much larger than all of it
  const fingers = new Map();  // the pointers that are down, and where
  let width = 1, height = 1, colors = {}, chosen = -1, hovered = -1, moved = false, asked = false;
  let widths = null;

  const farthest = (axis) => points.reduce((most, place) => Math.max(most, Math.abs(place[axis])), 1e-3);
  const reach = [farthest(0), farthest(1)];
  // Dots on the screen for a unit of the map: so many that all of it fits.
  const scale = () => view.zoom * Math.min(
    Math.max(40, width / 2 - MARGIN) / reach[0], Math.max(40, height / 2 - MARGIN / 2) / reach[1]);
  const toScreen = (row) => [
    width / 2 + (points[row][0] - view.x) * scale(),
    height / 2 - (points[row][1] - view.y) * scale(),
  ];
  const marked = () => (hovered >= 0 ? hovered : chosen);

  function draw() {
    asked = false;
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.font = FONT;
    pen.textBaseline = "middle";
    widths ??= tokens.map((token) => pen.measureText(token).width);
    const places = points.map((_, row) => toScreen(row));
    const seen = places.map(([x, y]) => x > -8 && y > -8 && x < width + 8 && y < height + 8);
    const row = marked();
    const near = new Set(row < 0 || !nearest ? [] : nearest[row].map(([token]) => rowOf.get(token)));
    const order = tokens.map((_, other) => other).sort(
      (a, b) => (b === row) - (a === row) || near.has(b) - near.has(a) || a - b);
    let number = 0;
    pen.fillStyle = colors.dot;
    for (const other of order) {
      if (!seen[other]) continue;
      const strong = other === row || near.has(other);
      pen.globalAlpha = strong ? 1 : 0.7;
      pen.fillStyle = other === row ? colors.marked : near.has(other) ? colors.near : colors.dot;
      pen.beginPath();
      pen.arc(places[other][0], places[other][1], other === row ? 6 : strong ? 4.5 : 3.2, 0, 7);
      pen.fill();
      number += 1;
    }
    pen.globalAlpha = 1;
    const labels = label(order, places, seen, row, near);
    document.body.dataset.points = String(number);
    document.body.dataset.labels = String(labels);
  }

  // Draw labels where there is room, those of the token pointed at and its neighbours before others.
  function label(order, places, seen, row, near) {
    const cells = new Map();
    let number = 0;
    for (const other of order) {
      if (seen[other]) put(cells, around(...places[other], 2));
    }
    for (const other of order) {
      if (!seen[other]) continue;
      const [x, y] = places[other], long = widths[other];
      const spots = [
        [x + 7, y], [x - 7 - long, y], [x - long / 2, y - 13], [x - long / 2, y + 13],
        [x + 5, y - 11], [x - 5 - long, y - 11], [x + 5, y + 11], [x - 5 - long, y + 11],
      ];
      const spot = spots.find(([left, middle]) =>
        left > 2 && left + long < width - 2 && middle > 8 && middle < height - 8 && take(cells, left, middle, long));
      if (!spot) continue;
      pen.fillStyle = other === row ? colors.marked : near.has(other) ? colors.near : colors.ink;
      pen.fillText(tokens[other], spot[0], spot[1]);
      number += 1;
    }
    return number;
  }

  const around = (x, y, far) => [x - far, y - far, x + far, y + far];

  // Boxes are kept by the rows of text that they lie in.
  function put(cells, box) {
    for (let band = Math.floor(box[1] / HEIGHT); band <= Math.floor(box[3] / HEIGHT); band += 1) {
      if (!cells.has(band)) cells.set(band, []);
      cells.get(band).push(box);
    }
  }

  // Take the box of a label if it is free.
  function take(cells, left, middle, long) {
    const box = [left - 2, middle - 7, left + long + 2, middle + 7];
    for (let band = Math.floor(box[1] / HEIGHT); band <= Math.floor(box[3] / HEIGHT); band += 1) {
      for (const other of cells.get(band) ?? []) {
        if (box[0] < other[2] && box[2] > other[0] && box[1] < other[3] && box[3] > other[1]) return false;
      }
    }
    put(cells, box);
    return true;
  }

  function redraw() {
    if (asked) return;
    asked = true;
    requestAnimationFrame(draw);
  }

  function tell() {
    const row = marked();
    card.hidden = row < 0;
    card.replaceChildren();
    if (row < 0) return;
    const name = document.createElement("h2");
    name.textContent = tokens[row];
    card.append(name);
    if (!nearest) return;
    const list = document.createElement("ol");
    for (const [token, cosine] of nearest[row]) {
      const item = document.createElement("li");
      if (rowOf.has(token)) item.className = "shown";
      for (const text of [token, cosine.toFixed(3)]) {
        const part = document.createElement("span");
        part.textContent = text;
        item.append(part);
      }
      list.append(item);
    }
    card.append(list);
  }

  function mark(row, hover) {
    if ((hover ? hovered : chosen) === row) return;
    if (hover) hovered = row;
    else [chosen, hovered] = [row, -1];
    tell();
    redraw();
  }

  function go(row) {
    if (row < 0) return;
    [view.x, view.y] = points[row];
    view.zoom = Math.max(view.zoom, 2.5);
    mark(row, false);
    redraw();
  }

  function zoom(factor, x = width / 2, y = height / 2) {
    const before = 1 / scale();
    view.zoom = Math.min(400, Math.max(0.5, view.zoom * factor));
    const after = 1 / scale();
    view.x += (x - width / 2) * (before - after);
    view.y -= (y - height / 2) * (before - after);
    redraw();
  }

  function move(x, y) {
    view.x -= x / scale();
    view.y += y / scale();
    redraw();
  }

  function all() {
    Object.assign(view, { x: 0, y: 0, zoom: 1 });
    redraw();
  }

  function closest(x, y) {
    let best = -1, least = REACH * REACH;
    for (let row = 0; row < points.length; row += 1) {
      const [left, top] = toScreen(row), far = (left - x) ** 2 + (top - y) ** 2;
      if (far < least) [best, least] = [row, far];
    }
    return best;
  }

  // Of several tokens that begin alike the first one; upper and lower case are one where nothing fits exactly.
  function find(text) {
    if (rowOf.has(text)) return rowOf.get(text);
    const low = text.toLowerCase();
    const same = tokens.findIndex((token) => token.toLowerCase() === low);
    return same >= 0 || !low ? same : tokens.findIndex((token) => token.toLowerCase().startsWith(low));
  }

  function lookUp() {
    const text = search.value.trim(), row = text ? find(text) : -1;
    answer.textContent = text && row < 0 ? "not on the map" : "";
    go(row);
  }

  const at = (event) => [event.offsetX, event.offsetY];
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, at(event));
    moved = fingers.size > 1;
    canvas.classList.add("moving");
  });
  canvas.addEventListener("pointermove", (event) => {
    const [x, y] = at(event), last = fingers.get(event.pointerId);
    if (!last) {
      mark(closest(x, y), true);
      return;
    }
    const other = [...fingers].find(([id]) => id !== event.pointerId)?.[1];
    if (other) {
      const span = (from) => Math.max(1, Math.hypot(from[0] - other[0], from[1] - other[1]));
      zoom(span([x, y]) / span(last), (x + other[0]) / 2, (y + other[1]) / 2);
      move((x - last[0]) / 2, (y - last[1]) / 2);
    } else if (moved || Math.hypot(x - last[0], y - last[1]) > 3) {
      moved = true;
      move(x - last[0], y - last[1]);
    } else {
      return;
    }
    fingers.set(event.pointerId, [x, y]);
  });
  const lift = (event) => {
    const was = fingers.delete(event.pointerId);
    if (!fingers.size) canvas.classList.remove("moving");
    if (was && event.type === "pointerup" && !moved) mark(closest(...at(event)), false);
  };
  canvas.addEventListener("pointerup", lift);
  canvas.addEventListener("pointercancel", lift);
  canvas.addEventListener("pointerleave", () => mark(-1, true));
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    // Lines and pages are counted by some mice instead of dots.
    const dots = event.deltaY * [1, 16, 100][event.deltaMode];
    zoom(Math.exp(-Math.max(-200, Math.min(200, dots)) * 0.002), ...at(event));
  }, { passive: false });
  const STEP = 60;
  const KEYS = {
    ArrowLeft: () => move(STEP, 0), ArrowRight: () => move(-STEP, 0),
    ArrowUp: () => move(0, STEP), ArrowDown: () => move(0, -STEP),
    "+": () => zoom(1.3), "=": () => zoom(1.3), "-": () => zoom(1 / 1.3), 0: all, Home: all,
    n: () => go(tokens.length ? (chosen + 1) % tokens.length : -1),
    p: () => go(tokens.length ? (Math.max(chosen, 0) + tokens.length - 1) % tokens.length : -1),
    Escape: () => mark(-1, false),
  };
  canvas.addEventListener("keydown", (event) => {
    const act = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    act();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || document.activeElement === search) return;
    event.preventDefault();
    search.focus();
    search.select();
  });
  search.form.addEventListener("submit", (event) => {
    event.preventDefault();
    lookUp();
  });
  search.addEventListener("input", (event) => {
    answer.textContent = "";
    // A choice from the list is no typing.
    if (!(event instanceof InputEvent) || event.inputType === "insertReplacementText") lookUp();
  });
  element("in").addEventListener("click", () => zoom(1.5));
  element("out").addEventListener("click", () => zoom(1 / 1.5));
  element("all").addEventListener("click", all);

  function readColors() {
    const style = getComputedStyle(document.documentElement);
    for (const name of ["ink", "dot", "marked", "near"]) {
      colors[name] = style.getPropertyValue(`--${name}`).trim();
    }
    redraw();
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", readColors);
  new ResizeObserver(() => {
    [width, height] = [canvas.clientWidth, canvas.clientHeight];
    draw();  // now, as what was drawn is stretched until then
  }).observe(canvas);
  element("found").append(...tokens.map((token) => Object.assign(document.createElement("option"), { value: token })));
  // The part of an address after # names the token to begin with.
  const named = () => {
    let text = location.hash.slice(1);
    try { text = decodeURIComponent(text); } catch { /* it is no escape, but a per cent sign */ }
    if (text) go(find(text));
  };
  [width, height] = [canvas.clientWidth, canvas.clientHeight];
  addEventListener("hashchange", named);
  readColors();
  named();
  draw();
})();
