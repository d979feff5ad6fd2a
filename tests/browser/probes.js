// SPDX-License-Identifier: Apache-2.0
// Copyright The NVFP4 Calibration Book authors
// What the tests ask a drawn page. Each probe returns a list of findings: empty is good.
() => {
  const words = (e) => (e.getAttribute("aria-label") || e.textContent).trim().replace(/\s+/g, " ").slice(0, 60);
  const shown = (e) => e.getClientRects().length > 0 && getComputedStyle(e).visibility !== "hidden";
  const all = (selector) => [...document.querySelectorAll(selector)].filter(shown);

  const wide = () => {
    const width = document.documentElement.clientWidth;
    const total = Math.max(document.body.scrollWidth, document.documentElement.scrollWidth);
    return total > width + 1 ? [`page of ${total} px in a window of ${width}`] : [];
  };

  // Font size on the screen: what the style says, times what the drawing is scaled by.
  const smallText = () =>
    all("figure svg text, figure svg tspan").flatMap((e) => {
      const m = e.closest("text").getScreenCTM();
      const size = parseFloat(getComputedStyle(e).fontSize) * Math.hypot(m.a, m.b);
      return size < 7.95 ? [`${size.toFixed(1)} px: ${words(e)}`] : [];
    });

  const luminance = (color) => {
    const [r, g, b] = color.match(/[\d.]+/g).map((v) => ((v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  // On white paper; white text stands on a painted field.
  const paleFigureText = () =>
    all("figure svg text, figure svg tspan").flatMap((e) => {
      const fill = getComputedStyle(e).fill;
      const ratio = 1.05 / (luminance(fill) + 0.05);
      return fill !== "rgb(255, 255, 255)" && ratio < 4.5 ? [`${ratio.toFixed(2)}: ${words(e)} in ${fill}`] : [];
    });

  // A reader who has not scrolled sees at least the first cell beside the row's name.
  const unseenNumbers = () =>
    all("article table").flatMap((table) => {
      const cell = [...table.querySelectorAll("tbody td")].find(shown);
      if (!cell) return [];
      let right = document.documentElement.clientWidth;
      for (let e = table.parentElement; e; e = e.parentElement)
        if (getComputedStyle(e).overflowX !== "visible") right = Math.min(right, e.getBoundingClientRect().right);
      const box = cell.getBoundingClientRect();
      const visible = Math.min(box.right, right) - box.left;
      return visible < Math.min(box.width, 100) - 1 ? [`${visible.toFixed(0)} px of ${words(cell)} in ${words(table)}`] : [];
    });

  const unreachable = () =>
    all("article *").flatMap((e) => {
      const scrolls = ["auto", "scroll"].includes(getComputedStyle(e).overflowX) && e.scrollWidth > e.clientWidth + 1;
      return scrolls && e.tabIndex < 0 ? [`${e.tagName}.${e.className}: ${words(e)}`] : [];
    });

  const unseenOutput = () =>
    [...document.querySelectorAll("article .cell_output, article .cell_output > *")].flatMap((e) =>
      e.textContent.trim() && !shown(e) && !e.closest("details:not([open])") ? [words(e)] : []);

  const invisibleIcons = () =>
    all("[class*='fa-']").flatMap((e) => {
      const content = getComputedStyle(e, "::before").content;
      const drawn = e.tagName === "svg" || (content !== "none" && content !== "normal");
      return drawn ? [] : [e.className];
    });

  return {
    "wider than the window": wide(),
    "figure text under 8 px": smallText(),
    "pale figure text": paleFigureText(),
    "numbers out of sight": unseenNumbers(),
    "scroll area that no key reaches": unreachable(),
    "output that is not shown": unseenOutput(),
    "icon without a drawing": invisibleIcons(),
  };
};
