"use strict";
// Draws the charts of a page with uPlot. Each <section class="chart-block"> has its data as JSON (charts.py).
globalThis.kvdistillCharts = (() => {
  const COLOURS = 8, HEIGHT = 210, MOST_DOTS = 80, LEAST_SMOOTHED = 20, NEAR_PIXELS = 6;
  const SMOOTHINGS = { "no smoothing": 0, "smoothing 0.6": 0.6, "smoothing 0.9": 0.9, "smoothing 0.97": 0.97 };
  const STEPS = [...Array(9).keys()].flatMap((power) => [1, 2, 5].map((first) => first * 10 ** power));
  const blocks = new Map(); // The section of each block, to its data, settings and plots.
  let updating = false; // While scales change, charts must not tell each other where the pointer is.

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const element = (tag, kind, text) => Object.assign(document.createElement(tag), { className: kind, textContent: text });

  function number(value) {
    if (Math.abs(value) >= 1000) return Math.round(value).toLocaleString("en");
    const rounded = Number(value.toPrecision(3));
    return rounded && Math.abs(rounded) < 0.001 ? rounded.toExponential() : String(rounded);
  }

  function shown(value, unit) {
    if (value === null || value === undefined) return "";
    if (unit === "%") return `${number(100 * value)}%`;
    return unit ? `${number(value)} ${unit}` : number(value);
  }

  // An exponential mean whose start is not pulled towards 0.
  function smooth(values, weight) {
    let sum = 0, norm = 0;
    return values.map((value) => {
      if (value === null || value === undefined) return value;
      sum = weight * sum + (1 - weight) * value;
      norm = weight * norm + (1 - weight);
      return sum / norm;
    });
  }

  // Rows for uPlot: steps, and one row for each curve, or two with smoothing: as measured, then smoothed.
  function rows(chart, settings) {
    const [x, ...curves] = uPlot.join(chart.curves.map((curve) => [curve.x, curve.y]));
    return [x, ...curves.flatMap((curve, place) => {
      const values = Array.from(curve, (value) => (settings.log && value <= 0 ? undefined : value));
      if (!settings.smoothing) return [values];
      // The mean of a few values would lag far behind.
      const few = chart.curves[place].x.length < LEAST_SMOOTHED;
      return [values, few ? values : smooth(values, settings.smoothing)];
    })];
  }

  function whole(x) {
    return x.length > 1 ? [x[0], x[x.length - 1]] : [x[0] - 1, x[0] + 1];
  }

  // The index of the value next to a position, since curves have values at different steps.
  function nearest(plot, row, index) {
    const values = plot.data[row];
    for (let away = 0; away < values.length; away++) {
      for (const place of [index - away, index + away]) {
        if (values[place] !== null && values[place] !== undefined) return place;
      }
    }
    return index;
  }

  function series(chart, settings) {
    const equal = (curve, other) => curve.y.length === other.y.length && curve.y.every((y, at) => y === other.y[at]);
    return chart.curves.flatMap((curve, place) => {
      // A curve is wider than equal ones that cover it.
      const width = 1.8 + 2.2 * chart.curves.slice(place + 1).filter((other) => equal(curve, other)).length;
      const colour = css(`--c${curve.colour % COLOURS}`), dash = curve.colour < COLOURS ? [] : [6, 4];
      // A lone value has no line, so few values are also drawn as dots.
      const dots = curve.x.length <= MOST_DOTS;
      const line = (stroke, show) => ({
        stroke, dash, width, spanGaps: true, points: { show, size: 5, width: 1, stroke, fill: stroke },
      });
      return settings.smoothing ? [line(`${colour}50`, false), line(colour, dots)] : [line(colour, dots)];
    });
  }

  function axis(unit, size, more) {
    const values = (_, splits) => splits.map((value) => shown(value, unit));
    const grid = { stroke: css("--line"), width: 0.5 };
    return { stroke: css("--soft"), font: "11px system-ui, sans-serif", grid, ticks: grid, size, values, ...more };
  }

  function drawLines(plot, chart) {
    const { ctx, bbox } = plot, ratio = uPlot.pxRatio;
    ctx.save();
    ctx.font = `${11 * ratio}px system-ui, sans-serif`;
    ctx.textAlign = "right";
    ctx.textBaseline = "bottom";
    ctx.fillStyle = ctx.strokeStyle = css("--soft");
    ctx.setLineDash([4 * ratio, 4 * ratio]);
    let written = Infinity; // From the bottom up: a text that would cover the one below is left out.
    for (const [value, text] of chart.lines) {
      if (value < plot.scales.y.min || value > plot.scales.y.max) continue;
      const y = Math.round(plot.valToPos(value, "y", true));
      ctx.beginPath();
      ctx.moveTo(bbox.left, y);
      ctx.lineTo(bbox.left + bbox.width, y);
      ctx.stroke();
      if (written - y < 12 * ratio) continue;
      written = y;
      ctx.fillText(text, bbox.left + bbox.width - 2 * ratio, y - ratio);
    }
    ctx.restore();
  }

  function drawEvents(plot, events) {
    const { ctx, bbox } = plot, ratio = uPlot.pxRatio, bottom = bbox.top + bbox.height, size = 4 * ratio;
    ctx.save();
    for (const { step, kind } of events) {
      if (step < plot.scales.x.min || step > plot.scales.x.max) continue;
      const x = plot.valToPos(step, "x", true);
      ctx.fillStyle = ctx.strokeStyle = css({ failover: "--bad", best: "--good" }[kind] ?? "--soft");
      ctx.beginPath();
      if (kind === "failover") {
        ctx.setLineDash([2 * ratio, 3 * ratio]);
        ctx.lineWidth = 1.5 * ratio;
        ctx.moveTo(x, bbox.top);
        ctx.lineTo(x, bottom);
        ctx.stroke();
      } else if (kind === "best") {
        ctx.moveTo(x - size, bottom);
        ctx.lineTo(x, bottom - 2 * size);
        ctx.lineTo(x + size, bottom);
        ctx.fill();
      } else {
        ctx.fillRect(x - size / 1.5, bottom - 1.5 * size, size * 1.5, size * 1.5);
      }
    }
    ctx.restore();
  }

  // The legend has the last values, or those under the pointer with their step and its events.
  function writeLegend(plot, figure, chart, events, settings) {
    const index = plot.cursor.idx, under = index !== null && index !== undefined;
    const size = settings.smoothing ? 2 : 1;
    const values = chart.curves.map((_, curve) => {
      const row = curve * size + size, last = plot.data[0].length - 1;
      return shown(plot.data[row][nearest(plot, row, under ? index : last)], chart.unit);
    });
    figure.querySelectorAll(".key b").forEach((key, curve) => { key.textContent = values[curve]; });
    const near = ({ step }) => Math.abs(plot.valToPos(step, "x") - plot.cursor.left) < NEAR_PIXELS;
    const found = under ? events.filter(near).map((event) => event.text) : [];
    const at = chart.time ? (x) => new Date(1000 * x).toLocaleTimeString() : (x) => `step ${x.toLocaleString("en")}`;
    figure.querySelector(".at").textContent = under ? [at(plot.data[0][index]), ...found].join(", ") : "";
    const summary = chart.curves.map((curve, place) => `${curve.name} ${values[place]}`).join("; ");
    figure.setAttribute("aria-label", `${chart.title}: ${summary}`);
  }

  function frame(chart) {
    const figure = element("figure", "chart", ""), caption = element("figcaption", "", "");
    figure.setAttribute("role", "img");
    const title = element("h3", "", `${chart.title} `);
    title.append(element("span", "at", ""));
    figure.append(title, caption);
    for (const curve of chart.curves) {
      const key = element("span", "key", ""), mark = element("i", `c${curve.colour % COLOURS}`, "");
      if (curve.colour >= COLOURS) mark.classList.add("dashed");
      key.append(mark, `${curve.name} `, element("b", "", ""));
      caption.append(key, " ");
    }
    return figure;
  }

  function build(block, chart, figure) {
    const { settings } = block;
    const range = (_, low, high) => {
      const least = Math.min(0, low ?? 0), most = chart.top ?? high ?? 1;
      return [least, most > least ? most + (chart.top ? 0.02 : 0.06) * (most - least) : least + 1];
    };
    const steps = chart.time ? {} : { incrs: STEPS, values: (_, splits) => splits.map((x) => x.toLocaleString("en")) };
    const below = { values: undefined, ...steps, label: chart.time ? undefined : "step", labelSize: 16, labelGap: 0 };
    const options = {
      width: figure.clientWidth, height: HEIGHT, padding: [8, chart.time ? 24 : 12, 0, 0], legend: { show: false },
      cursor: {
        y: false, dataIdx: nearest, points: { size: 7 },
        sync: { key: chart.time ? "time" : "step", filters: { pub: () => !updating, sub: () => !updating } },
      },
      scales: {
        x: { time: chart.time, range: (plot, low, high) => (low === high ? whole([low]) : [low, high]) },
        y: settings.log ? { distr: 3 } : { range },
      },
      axes: [axis("", 30, { ...below, labelFont: "11px system-ui, sans-serif" }), axis(chart.unit, chart.unit.length > 1 ? 76 : 56, {})],
      series: [{}, ...series(chart, settings)],
      hooks: {
        draw: [(plot) => drawLines(plot, plot.chart), (plot) => chart.time || drawEvents(plot, block.data.events)],
        setCursor: [(plot) => writeLegend(plot, figure, plot.chart, block.data.events, settings)],
      },
    };
    const plot = new uPlot(options, rows(chart, settings), (made, start) => {
      made.chart = chart;
      figure.insertBefore(made.root, figure.querySelector("figcaption"));
      start();
    });
    writeLegend(plot, figure, chart, block.data.events, settings);
    return { plot, figure };
  }

  function rebuild(block) {
    block.drawn.forEach(({ plot }) => plot.destroy());
    // All figures first, since their number determines their width.
    const figures = block.data.charts.map(frame);
    block.grid.replaceChildren(...figures);
    block.drawn = block.data.charts.map((chart, place) => build(block, chart, figures[place]));
  }

  // Keeps zoom and pointer.
  function update(block) {
    updating = true;
    block.drawn.forEach(({ plot, figure }, place) => {
      const { min, max } = plot.scales.x, [first, last] = whole(plot.data[0]);
      const zoomed = min > first || max < last, chart = block.data.charts[place];
      plot.chart = chart;
      plot.setData(rows(chart, block.settings), !zoomed);
      if (zoomed) plot.setScale("x", { min, max });
      writeLegend(plot, figure, chart, block.data.events, block.settings);
    });
    // uPlot applies new data after this task.
    setTimeout(() => {
      updating = false;
      const pointed = block.drawn.find(({ plot }) => plot.over.matches(":hover"))?.plot;
      pointed?.setCursor({ left: pointed.cursor.left, top: pointed.cursor.top }, true, true);
    });
  }

  function controls(block) {
    const bar = element("p", "controls", ""), log = element("input", "", ""), choice = element("select", "", "");
    log.type = "checkbox";
    log.addEventListener("change", () => { block.settings.log = log.checked; rebuild(block); });
    for (const [text, weight] of Object.entries(SMOOTHINGS)) choice.append(new Option(text, weight));
    choice.setAttribute("aria-label", "smoothing");
    choice.addEventListener("change", () => { block.settings.smoothing = Number(choice.value); rebuild(block); });
    const label = element("label", "", "");
    label.append(log, " logarithmic");
    bar.append(label, choice);
    for (const kind of ["best", "checkpoint", "failover"]) {
      const key = element("span", "mark", "");
      key.append(element("i", kind, ""), kind === "best" ? "new best" : kind);
      bar.append(key);
    }
    bar.append(element("span", "mouse", "drag to zoom, double-click to go back"));
    return bar;
  }

  const outline = (data) => JSON.stringify(data.charts.map((chart) => [chart.title, ...chart.curves.map(({ name }) => name)]));

  function draw(section, data) {
    let block = blocks.get(section);
    if (!block) {
      block = { grid: element("div", "charts", ""), settings: { log: false, smoothing: 0 }, drawn: [], data };
      section.append(...(data.controls ? [controls(block)] : []), block.grid);
      blocks.set(section, block);
      new ResizeObserver(() => block.drawn.forEach(({ plot, figure }) => {
        if (figure.clientWidth !== plot.width) plot.setSize({ width: figure.clientWidth, height: HEIGHT });
      })).observe(block.grid);
    }
    const same = block.drawn.length && outline(block.data) === outline(data);
    block.data = data;
    if (same) update(block); else rebuild(block);
  }

  const read = (section) => JSON.parse(section.querySelector("script").textContent);
  document.querySelectorAll(".chart-block").forEach((section) => draw(section, read(section)));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => blocks.forEach(rebuild));
  return { draw, read };
})();
