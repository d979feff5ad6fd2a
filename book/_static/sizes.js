/* SPDX-License-Identifier: Apache-2.0
   Copyright The NVFP4 Calibration Book authors

   The element "sizes": what amax calibration on n random sequences gives, over all subsets of n, exactly. */
window.moving ??= { elements: {} };
(() => {
  "use strict";

  /* Of N values, given as ascending distinct ones and how often each occurs, the share of subsets of n whose largest
     is each: C(M, n) of the C(N, n) subsets lie within the M smallest. */
  function subsetMaximum(counts, n) {
    const total = counts.reduce((a, b) => a + b, 0);
    const logs = [0];
    for (let i = 1; i <= total; i++) logs.push(logs[i - 1] + Math.log(i));
    const within = (m) => (m < n ? 0 : Math.exp(logs[m] - logs[m - n] - logs[total] + logs[total - n]));
    let below = 0, before = 0;
    return counts.map((count) => {
      below += count;
      const share = within(below) - before;
      before += share;
      return share;
    });
  }

  /* The smallest values at or below which lie at least the shares of the weight, as snr_tables.weighted_quantiles. */
  function quantiles(values, weights, shares) {
    const order = values.map((_, i) => i).sort((a, b) => values[a] - values[b] || a - b);
    return shares.map((share) => {
      let sum = 0;
      for (const i of order) if ((sum += weights[i]) >= share - 1e-9) return values[i];
      return values[order.at(-1)];
    });
  }

  /* Amax (median, 5 %, 95 %) and SNR (mean, 5 %, 95 %) of n sequences. */
  function ofSize(site, unit, n) {
    const weights = subsetMaximum(site.count, n), snr = site.snr.map((v) => v * unit);
    const [low, amax, high] = quantiles(site.amax, weights, [0.05, 0.5, 0.95]);
    const [worse, better] = quantiles(snr, weights, [0.05, 0.95]);
    return { n, weights, amax, low, high, worse, better, snr: snr.reduce((sum, v, i) => sum + v * weights[i], 0) };
  }

  window.moving.elements.sizes = async (root, settings, show) => {
    const { make, draw, select, unpack, readState, writeState, speaker, short, decibels, onWidth } = window.moving;
    const sites = await unpack(settings.data);
    const state = readState("sizes", { site: settings.site, n: "1" });
    const controls = make("div", { class: "moving-controls" });
    const slider = make("input", { type: "range", min: 0, step: 1 });
    const plot = make("div", { class: "moving-plot" });
    const readout = make("dl", { class: "moving-readout" });
    const said = speaker();
    let curve, sizes, width = 0;
    root.append(make("p", { class: "moving-caption" }, "One site, over all subsets of so many sequences, exactly: pick a size."), controls, plot, make("label", { class: "moving-slider" }, make("span", {}, "calibration sequences"), slider), readout, said);

    function repair() {
      if (!sites[state.site]) state.site = settings.site;
      const site = sites[state.site], total = site.count.reduce((a, b) => a + b, 0);
      sizes = [...new Set(Array.from({ length: 8 * Math.log2(total) + 1 }, (_, k) => Math.round(2 ** (k / 8)))), total];
      sizes = [...new Set(sizes)];
      curve = sizes.map((n) => ofSize(site, settings.unit, n));
      slider.max = sizes.length - 1;
      controls.replaceChildren(select("site", settings.sites, state.site, (name) => { go({ site: name }); repair(); move(); }));
    }

    function go(changes) {
      Object.assign(state, changes);
      writeState("sizes", state);
    }

    const place = () => {
      const at = sizes.findIndex((n) => n >= Number(state.n));
      return at < 0 ? sizes.length - 1 : at;
    };

    function move() {
      slider.value = place();
      const here = curve[place()], whole = curve.at(-1);
      const rows = {
        "sequences": `${here.n} of ${whole.n}`,
        "amax, median": short(here.amax, 4),
        "amax, 5 to 95 %": `${short(here.low, 4)} to ${short(here.high, 4)}`,
        "SNR, mean": decibels(here.snr),
        "SNR, 5 to 95 %": `${here.worse.toFixed(2)} to ${decibels(here.better)}`,
        "lost against all": decibels(whole.snr - here.snr),
        "subsets with the whole amax": `${short(100 * here.weights.at(-1))} %`,
      };
      readout.replaceChildren(...Object.entries(rows).map(([k, v]) =>
        make("div", { "data-name": k }, make("dt", {}, k), make("dd", {}, v))));
      const words = `${here.n} ${here.n === 1 ? "sequence" : "sequences"}: amax ${rows["amax, median"]} in the median, SNR ${rows["SNR, mean"]} on average, ` +
        `${rows["lost against all"]} less than all ${whole.n}`;
      slider.setAttribute("aria-valuetext", words);
      said.say(`${words}.`);
      if (width) drawPlot();
    }

    function drawPlot() {
      const left = 46, right = 16, top = 22, high = 200, end = top + high;
      const picture = draw("svg", { viewBox: `0 0 ${width} ${end + 40}`, width, height: end + 40, role: "img",
        "aria-label": `SNR of ${state.site} against the number of calibration sequences, with a band; the slider below moves along it.` });
      const x = (n) => left + (Math.log2(n) / Math.log2(sizes.at(-1))) * (width - left - right);
      const values = curve.flatMap((c) => [c.worse, c.better]);
      const span = Math.max(Math.max(...values) - Math.min(...values), 0.2);
      const step = [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10].find((s) => span / s <= 7) ?? 20;
      const low = step * Math.floor(Math.min(...values) / step), most = Math.max(step * Math.ceil(Math.max(...values) / step), low + step);
      const y = (v) => top + ((most - v) / (most - low)) * high;
      const text = (px, py, content, anchor = "middle") => draw("text", { x: px, y: py, "text-anchor": anchor }, content);
      const line = (x1, y1, x2, y2, kind) => draw("line", { x1, y1, x2, y2, class: kind });
      for (let k = 0; low + k * step <= most + step / 2; k++) {
        const v = low + k * step;
        picture.append(line(left, y(v), width - right, y(v), "grid"), text(left - 6, y(v) + 4, v.toFixed(step < 0.1 ? 2 : step < 1 ? 1 : 0), "end"));
      }
      for (let n = 1; n <= sizes.at(-1); n *= width < 500 ? 4 : 2) picture.append(line(x(n), top, x(n), end, "grid"), text(x(n), end + 16, n));
      const points = (key) => curve.map((c) => `${x(c.n).toFixed(1)},${y(c[key]).toFixed(1)}`);
      picture.append(
        draw("path", { class: "band", fill: settings.color, d: `M${[...points("worse"), ...points("better").reverse()].join("L")}Z` }),
        draw("path", { fill: "none", stroke: settings.color, "stroke-width": 2, d: `M${points("snr").join("L")}` }),
        text(4, 13, "SNR (dB): mean, and 5 to 95 % of subsets", "start"), text((left + width - right) / 2, end + 34, "calibration sequences"));
      const here = curve[place()];
      picture.append(line(x(here.n), top, x(here.n), end, "cursor"), draw("circle", { cx: x(here.n), cy: y(here.snr), r: 4, class: "cursor" }));
      plot.onpointerdown = plot.onpointermove = (event) => {
        if (event.type === "pointermove" && !event.buttons) return;
        plot.setPointerCapture(event.pointerId);
        const exponent = ((event.clientX - plot.getBoundingClientRect().left - left) / (width - left - right)) * Math.log2(sizes.at(-1));
        const nearest = sizes.reduce((a, b) => (Math.abs(Math.log2(b) - exponent) < Math.abs(Math.log2(a) - exponent) ? b : a));
        go({ n: String(nearest) });
        move();
      };
      plot.replaceChildren(picture);
    }

    slider.addEventListener("input", () => { go({ n: String(sizes[slider.value]) }); move(); });
    window.addEventListener("hashchange", () => { Object.assign(state, readState("sizes", state)); repair(); move(); });
    repair();
    move();
    show();
    onWidth(plot, (wide) => { width = wide; drawPlot(); });
  };

  Object.assign(window.moving, { subsetMaximum, ofSize });
})();
