"use strict";
(() => {
  const data = JSON.parse(document.getElementById("charts").textContent);
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const dashes = ["solid", "dash", "dashdot"];
  const color = (i) => css(["--first", "--second", "--third"][i % 3]);
  const dash = (i) => dashes[(i + Math.floor(i / 3)) % 3]; // nine curves can be told apart
  const finite = (values) => values.filter(Number.isFinite);
  // Names are drawn as they are, not as markup.
  const plain = (name) => name.replace(/&/g, "&amp;").replace(/</g, "&lt;");

  // A band on a logarithmic axis: closed areas where its lower edge is on the axis, elsewhere its upper edge alone.
  function band(one, floor, shade, edge) {
    const areas = { x: [], y: [] }, above = { x: [], y: [] };
    let from = 0;
    const inside = (i) => one.lower[i] > floor;
    const close = (to) => {
      if (to - from > 1) {
        const there = Array.from({ length: to - from }, (_, i) => from + i), back = [...there].reverse();
        areas.x.push(...there.map((i) => one.grid[i]), ...back.map((i) => one.grid[i]), null);
        areas.y.push(...there.map((i) => one.upper[i]), ...back.map((i) => one.lower[i]), null);
      }
    };
    one.grid.forEach((x, i) => {
      if (!inside(i)) {
        close(i);
        from = i + 1;
      }
      above.x.push(x);
      above.y.push(!inside(i) && one.upper[i] > floor ? one.upper[i] : null);
    });
    close(one.grid.length);
    const both = { mode: "lines", hoverinfo: "skip", showlegend: false };
    return [
      { ...both, ...areas, fill: "toself", fillcolor: shade, line: { width: 0 } },
      { ...both, ...above, line: { color: edge, width: 1, dash: "dot" } },
    ];
  }

  function spectrum({ curves: series, floor }) {
    const top = Math.max(...series.flatMap((one) => finite(one.values)));
    const traces = series.flatMap((one, i) => {
      const name = plain(one.name), line = { color: color(i), width: 1.6, dash: dash(i) };
      const hovertemplate = "eigenvalue %{x:.4g}<br>density %{y:.3g}<extra>" + name + "</extra>";
      return [
        ...(one.upper && one.lower ? band(one, floor, color(i) + "40", color(i)) : []),
        { x: one.grid, y: one.values.map((y) => (y >= floor ? y : null)), mode: "lines", line, name: name || "density", hovertemplate },
        {
          x: one.eigenvalues,
          y: one.eigenvalues.map(() => floor * 10 ** (0.3 + 0.35 * i)),
          error_x: { type: "data", array: one.residuals, color: color(i), thickness: 1, width: 3 },
          mode: "markers",
          marker: { color: color(i), size: 7, symbol: ["circle", "square", "diamond"][i % 3] },
          name: "eigenvalues found",
          showlegend: !name,
          hovertemplate: "eigenvalue %{x:.5g}<extra>" + name + "</extra>",
        },
      ];
    });
    const seen = series.flatMap((one) => one.grid.filter((_, i) => one.values[i] >= floor));
    const low = Math.min(...seen), high = Math.max(...seen), margin = 0.03 * (high - low);
    return {
      traces,
      layout: {
        xaxis: { title: { text: "eigenvalue" }, range: [low - margin, high + margin] },
        yaxis: {
          title: { text: "spectral density", standoff: 15 },
          type: "log",
          range: [Math.log10(floor), Math.log10(top) + 0.2],
          exponentformat: "power",
          dtick: Math.log10(top / floor) > 5 ? 2 : 1,
        },
      },
    };
  }

  // Small panels one above the other, over the reports in their order.
  function training({ names, panels }) {
    const share = 1 / panels.length;
    const layout = { xaxis: { type: "category", title: { text: "report" } }, showlegend: false, annotations: [] };
    const traces = panels.map(({ title, values, errors }, i) => {
      const number = i ? i + 1 : "", top = 1 - i * share - 0.2 * share;
      layout["yaxis" + number] = { domain: [1 - (i + 0.96) * share, top], nticks: 4 };
      const place = { xref: "paper", x: 0, xanchor: "left", yref: "paper", y: top, yanchor: "bottom" };
      layout.annotations.push({ text: title, showarrow: false, ...place });
      return {
        x: names,
        y: values,
        yaxis: "y" + number,
        error_y: { type: "data", array: errors, color: color(0), thickness: 1, width: 3 },
        mode: "lines+markers",
        line: { color: color(0), width: 2 },
        hovertemplate: "%{x}: %{y:.5g}<extra>" + title + "</extra>",
      };
    });
    layout.xaxis.anchor = panels.length > 1 ? "y" + panels.length : "y";
    return { traces, layout };
  }

  function lines({ steps, losses }) {
    const values = finite(Object.values(losses).flat());
    const sizes = values.map(Math.abs).sort((a, b) => a - b);
    const wide = values.every((y) => y > 0) && sizes.at(-1) > 50 * sizes[Math.floor(sizes.length / 2)];
    const traces = Object.entries(losses).map(([name, y], i) => ({
      x: steps,
      y,
      name: plain(name),
      mode: "lines",
      line: { color: color(i), width: 2, dash: dash(i) },
      hovertemplate: "distance %{x:.3g}<br>loss %{y:.4g}",
    }));
    const xaxis = { title: { text: "distance from the parameters" } };
    return { traces, layout: { xaxis, yaxis: { title: { text: "loss" }, type: wide ? "log" : "linear" } } };
  }

  function surface({ steps, losses }) {
    if (!document.createElement("canvas").getContext("webgl")) throw new Error("no WebGL: the contours stay");
    const heights = finite(losses.flat());
    const low = Math.min(...heights), high = Math.max(...heights);
    const wide = low > 0 && high > 50 * low;
    const axis = (text) => ({ title: { text }, color: css("--text"), gridcolor: css("--line"), nticks: 6 });
    const trace = {
      type: "surface",
      x: steps,
      y: steps,
      z: losses,
      surfacecolor: wide ? losses.map((row) => row.map((z) => (z === null ? null : Math.log10(z)))) : losses,
      colorscale: "Cividis",
      showscale: false,
      contours: { x: { show: true, color: "#0003" }, y: { show: true, color: "#0003" } },
      hovertemplate: "first %{y:.3g}, second %{x:.3g}<br>loss %{z:.4g}<extra></extra>",
    };
    const away = matchMedia("(max-width: 34rem)").matches ? 1.4 : 1; // on a phone the labels need the room
    const scene = {
      xaxis: axis("second direction"),
      yaxis: axis("first direction"),
      zaxis: { ...axis("loss"), type: wide ? "log" : "linear", exponentformat: "power" },
      aspectratio: { x: 1, y: 1, z: 0.8 },
      camera: { eye: { x: 1.5 * away, y: 1.25 * away, z: 0.8 * away }, center: { x: 0, y: 0, z: -0.15 } },
    };
    return { traces: [trace], layout: { scene, margin: { l: 0, r: 0, t: 0, b: 0 } } };
  }

  const kinds = { spectrum, lines, surface, training };

  async function load() {
    const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
    const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(unpacked).text();
    document.head.append(script);
    return window.Plotly;
  }

  async function draw(Plotly, chart) {
    const { traces, layout } = kinds[chart.dataset.chart](data[chart.dataset.chart]);
    const axis = { color: css("--text"), gridcolor: css("--line"), zerolinecolor: css("--soft"), automargin: true };
    const axes = Object.keys(layout).filter((name) => /^[xy]axis/.test(name));
    const legend = { orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0.5, xanchor: "center", traceorder: "normal" };
    const touch = matchMedia("(pointer: coarse)").matches;
    chart.hidden = chart.closest("figure").hidden = false; // it has no size before
    await Plotly.react(
      chart,
      traces,
      {
        paper_bgcolor: "transparent",
        plot_bgcolor: "transparent",
        font: { family: "system-ui, sans-serif", size: 13, color: css("--text") },
        margin: { l: 10, r: 10, t: 30, b: 80 },
        modebar: { bgcolor: "transparent", color: css("--soft"), activecolor: css("--text") },
        legend,
        hovermode: "closest",
        dragmode: touch ? false : "zoom", // a finger scrolls the page
        ...layout,
        ...(layout.scene ? { dragmode: "turntable" } : {}),
        ...Object.fromEntries(axes.map((name) => [name, { ...axis, ...layout[name] }])),
      },
      {
        responsive: true,
        displaylogo: false,
        displayModeBar: !touch,
        modeBarButtonsToRemove: ["select2d", "lasso2d"],
        scrollZoom: false,
        showSendToCloud: false, // nothing leaves the page
        plotlyServerURL: "",
      },
    );
    chart.closest("figure").querySelector(".still")?.classList.add("replaced");
  }

  async function drawAll(Plotly) {
    for (const chart of document.querySelectorAll("[data-chart]")) {
      try {
        await draw(Plotly, chart);
      } catch (error) {
        chart.hidden = true;
        const figure = chart.closest("figure");
        figure.hidden = !figure.querySelector(".still");
        console.warn(error); // the still picture, here or beside it, says the same
      }
    }
    document.documentElement.dataset.charts = "drawn";
  }

  load().then((Plotly) => {
    drawAll(Plotly);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawAll(Plotly));
  }, console.error);
})();
