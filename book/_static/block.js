/* SPDX-License-Identifier: Apache-2.0
   Copyright The NVFP4 Calibration Book authors

   The element "block": 16 values quantized as nvfp4_utils.quantize.fake_quantize does, bit for bit, and their codes. */
window.moving ??= { elements: {} };
(() => {
  "use strict";
  const f32 = Math.fround;
  const E2M1_MAX = 6, E4M3_MAX = 448, AMAX_PER_SCALE = E2M1_MAX * E4M3_MAX;
  const MIN_NORMAL = 2 ** -6, MIN_SUBNORMAL = 2 ** -9;

  /* To the nearest multiple of a power of two, ties to the even one: adding 1.5 * 2^23 steps rounds a float32. */
  const toStep = (value, step) => { const magic = f32(1.5 * 2 ** 23 * step); return f32(f32(value + magic) - magic); };
  const floorPower = (value) => 2 ** Math.floor(Math.log2(value));

  /* Nonnegative float32 to the nearest E2M1 magnitude, at most 6. */
  function roundE2M1(u) {
    return Math.min(u >= 8 ? E2M1_MAX : toStep(u, u < 2 ? 0.5 : u < 4 ? 1 : 2), E2M1_MAX);
  }

  /* Float32 in [0, 448] to the nearest E4M3 number: 8 steps a binade, 8 subnormal ones. */
  function roundE4M3(s) {
    return toStep(s, Math.max(floorPower(s), MIN_NORMAL) / 8);
  }

  /* e4m3(min(b / (6 g), 448)); floor lifts it to 2^-9, and to 1 if the block is zero. */
  function blockScale(amax, g, underflow) {
    const s = Math.min(f32(amax / f32(E2M1_MAX * g)), E4M3_MAX);
    const s8 = roundE4M3(s);
    return underflow === "floor" ? (s === 0 ? 1 : Math.max(s8, MIN_SUBNORMAL)) : s8;
  }

  /* Float32 values of one block and its scale: the numbers of every stage, all float32. */
  function quantizeBlock(x, g, underflow) {
    const amax = Math.max(...x.map(Math.abs));
    const s8 = blockScale(amax, g, underflow), step = f32(s8 * g);
    const q = x.map((v) => (step === 0 ? 0 : roundE2M1(f32(Math.abs(v) / step))));
    const y = q.map((v, i) => { const m = f32(v * step); return x[i] < 0 || Object.is(x[i], -0) ? -m : m; });
    return { amax, s: f32(amax / f32(E2M1_MAX * g)), s8, step, q, y };
  }

  /* s eee mmm fields of a nonnegative number of a small float, as bits. */
  function bits(value, mantissa, bias, exponent) {
    const e = value === 0 ? 1 : Math.max(Math.floor(Math.log2(value)) + bias, 1);
    const units = value / 2 ** (e - bias - mantissa);
    const normal = units >= 2 ** mantissa;
    const field = (n, width) => n.toString(2).padStart(width, "0");
    return [field(normal ? e : 0, exponent), field(normal ? units - 2 ** mantissa : units, mantissa)];
  }

  const e2m1Bits = (q, negative) => [negative ? "1" : "0", ...bits(q, 1, 1, 2)];
  const e4m3Bits = (s8) => ["0", ...bits(s8, 3, 7, 4)];

  const PER_OCTAVE = 16;
  const CONVENTIONS = [["flush", "flush (kernels)"], ["floor", "floor (reference)"]];

  window.moving.elements.block = async (root, settings, show) => {
    const { make, draw, select, readState, writeState, speaker, short, onWidth } = window.moving;
    const state = readState("block", { octaves: "0", underflow: settings.underflow });
    const x = settings.block;
    const amaxOf = (octaves) => settings.amax * 2 ** octaves;
    const controls = make("div", { class: "moving-controls" });
    const plot = make("div", { class: "moving-plot" });
    const [first, last] = settings.range;
    const slider = make("input", { type: "range", min: first * PER_OCTAVE, max: last * PER_OCTAVE, step: 1 });
    const words = make("p", { class: "moving-caption" });
    const table = make("div", { class: "moving-scroll" });
    const said = speaker();
    let width = 0, now;
    root.append(controls, make("label", { class: "moving-slider" }, make("span", {}, `octaves from a calibrated amax of ${settings.amax}`), slider),
      words, plot, said, table);

    const code = (fields) => make("code", { class: "moving-bits" }, fields.join(" "));

    function update() {
      const octaves = Number(state.octaves);
      const g = f32(amaxOf(octaves) / AMAX_PER_SCALE);
      now = quantizeBlock(x, g, state.underflow);
      slider.value = octaves * PER_OCTAVE;
      const regime = now.s > E4M3_MAX ? "saturated" : now.s >= MIN_NORMAL ? "normal"
        : now.s > MIN_SUBNORMAL / 2 ? "subnormal" : state.underflow === "flush" ? "flushed to zero" : "held at 2^-9";
      const zeros = now.y.filter((v, i) => v === 0 && x[i] !== 0).length;
      words.replaceChildren(`Calibrated amax ${short(amaxOf(octaves), 4)}, input_scale ${short(g, 4)}. Block scale ` +
        `${short(now.s, 4)} → ${short(now.s8, 4)}, E4M3 `, code(e4m3Bits(now.s8)), `: ${regime}. One unit of E2M1 is worth ${short(now.step, 4)}.`);
      const error = Math.sqrt(now.y.reduce((sum, v, i) => sum + (v - x[i]) ** 2, 0) / x.length);
      const text = `calibrated amax ${short(amaxOf(octaves), 4)}: the block's scale is ${regime}, ${zeros} of 16 values become zero, ` +
        `root mean square error ${short(error)}`;
      slider.setAttribute("aria-valuetext", text);
      said.say(text[0].toUpperCase() + text.slice(1) + ".");
      const rows = x.map((v, i) => make("tr", { class: now.y[i] === 0 && v !== 0 ? "moving-lost" : null },
        make("th", { scope: "row" }, String(i + 1)), make("td", {}, short(v, 4)),
        make("td", {}, now.step === 0 ? "–" : (Math.sign(v) * f32(Math.abs(v) / now.step)).toPrecision(3)),
        make("td", {}, code(e2m1Bits(now.q[i], v < 0))), make("td", {}, String(Math.sign(v) * now.q[i] || 0)),
        make("td", {}, short(now.y[i], 4)), make("td", {}, short(now.y[i] - v, 2))));
      const heads = ["", "x", "u", "bits s ee m", "q", "y", "y − x"];
      table.replaceChildren(make("table", { "aria-label": "The 16 values" },
        make("thead", {}, make("tr", {}, ...heads.map((h) => make("th", { scope: "col" }, h)))), make("tbody", {}, ...rows)));
      if (width) drawPlot();
    }

    /* Each value as a bar, and where it lands as a line across. */
    function drawPlot() {
      const height = 170, middle = height / 2, wide = (width - 20) / 16;
      const top = Math.max(now.amax, ...now.y.map(Math.abs)) * 1.1;
      const y = (v) => middle - (v / top) * (middle - 6);
      const picture = draw("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img",
        "aria-label": "The block's 16 values as bars, and a line across each where it lands." });
      picture.append(draw("line", { x1: 0, x2: width, y1: middle, y2: middle, class: "grid" }));
      if (now.step) for (const q of [-6, -4, -3, -2, -1.5, -1, -0.5, 0.5, 1, 1.5, 2, 3, 4, 6])
        if (Math.abs(q * now.step) < top) picture.append(draw("line", { x1: 0, x2: width, y1: y(q * now.step), y2: y(q * now.step), class: "grid" }));
      x.forEach((v, i) => {
        const left = 10 + i * wide;
        picture.append(draw("rect", { x: left + wide * 0.25, width: wide * 0.5, y: Math.min(y(v), middle), height: Math.abs(y(v) - middle), fill: "#999" }),
          draw("line", { x1: left + wide * 0.08, x2: left + wide * 0.92, y1: y(now.y[i]), y2: y(now.y[i]), class: "landing" }));
      });
      plot.replaceChildren(picture);
    }

    function go(changes) {
      Object.assign(state, changes);
      writeState("block", state);
      update();
    }

    function repair() {
      const octaves = Math.round(Number(state.octaves) * PER_OCTAVE) / PER_OCTAVE;
      state.octaves = String(Number.isFinite(octaves) ? Math.min(Math.max(octaves, first), last) : 0);
      if (!CONVENTIONS.some(([name]) => name === state.underflow)) state.underflow = settings.underflow;
      controls.replaceChildren(select("block scales below E4M3", CONVENTIONS, state.underflow, (underflow) => go({ underflow })));
    }

    slider.addEventListener("input", () => go({ octaves: String(slider.value / PER_OCTAVE) }));
    window.addEventListener("hashchange", () => { Object.assign(state, readState("block", state)); repair(); update(); });
    repair();
    update();
    show();
    onWidth(plot, (wide) => { width = wide; drawPlot(); });
  };

  Object.assign(window.moving, { quantizeBlock, e2m1Bits, e4m3Bits });
})();
