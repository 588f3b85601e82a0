"use strict";

// Line charts in SVG, drawn in the pixels of their frame so that text keeps its size. A cursor, moved by the pointer or
// the arrow keys, reads the values into the legend; without one the legend shows the newest.

const MARGIN = {top: 10, right: 12, bottom: 24, left: 58};
const HEIGHT = 220;
const MOST_POINTS = 600;

function element(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

function shape(name, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

// Children that are strings become text, never markup.
function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

class Chart {
  // options: x and y, how to write a value, and at, how to name an x; step, what marks on x are multiples of; empty, what to
  // say without data.
  constructor(figure, options) {
    this.options = options;
    this.legend = figure.appendChild(element("ul", {class: "legend"}));
    this.svg = figure.appendChild(shape("svg", {role: "img", tabindex: "0"}));
    this.empty = figure.appendChild(element("p", {class: "empty"}, options.empty));
    this.cursor = null;
    this.svg.addEventListener("pointermove", event => this.point(event.clientX - this.svg.getBoundingClientRect().left));
    this.svg.addEventListener("pointerleave", () => this.move(null));
    this.svg.addEventListener("blur", () => this.move(null));
    this.svg.addEventListener("keydown", event => this.key(event));
    this.update({series: []});
    new ResizeObserver(() => this.draw()).observe(figure);
  }

  // data.series: {name, style, points: [[x, y], ...] by rising x, gap: x beyond which no line joins two points, dots}.
  // data.bands: {name, spans: [[x, x], ...]}. data.x, data.y: [from, to] where the data does not decide.
  update(data) {
    this.data = {...data, series: data.series.map(series => ({...series, points: thinned(series.points)}))};
    this.xs = [...new Set(this.data.series.flatMap(series => series.points.map(([x]) => x)))].sort((a, b) => a - b);
    this.draw();
  }

  draw() {
    const shown = this.xs.length > 0 || Boolean(this.data.bands?.spans.length);
    this.svg.toggleAttribute("hidden", !shown);
    this.legend.hidden = !shown;
    this.empty.hidden = shown;
    this.width = this.svg.clientWidth;
    if (!shown || this.width === 0) return;
    this.scale();
    this.svg.replaceChildren(...this.bands(), ...this.axes(), ...this.data.series.flatMap(series => this.line(series)), ...this.mark());
    this.read();
  }

  scale() {
    const {data} = this;
    const values = data.series.flatMap(series => series.points.map(([, y]) => y));
    const [x0, x1] = data.x ?? extent(this.xs);
    const [y0, y1] = data.y ?? padded(extent(values));
    this.domain = {x: [x0, x1], y: [y0, y1]};
    this.x = x => MARGIN.left + (x - x0) / (x1 - x0 || 1) * (this.width - MARGIN.left - MARGIN.right);
    this.y = y => HEIGHT - MARGIN.bottom - (y - y0) / (y1 - y0 || 1) * (HEIGHT - MARGIN.top - MARGIN.bottom);
  }

  axes() {
    const nodes = [];
    for (const y of ticks(...this.domain.y, 4)) {
      nodes.push(shape("line", {x1: MARGIN.left, x2: this.width - MARGIN.right, y1: this.y(y), y2: this.y(y)}));
      nodes.push(shape("text", {x: MARGIN.left - 8, y: this.y(y) + 4, "text-anchor": "end"}, this.options.y(y)));
    }
    for (const x of ticks(...this.domain.x, Math.max(2, this.width / 110), this.options.step)) {
      const anchor = this.x(x) > this.width - 30 ? "end" : "middle";
      nodes.push(shape("text", {x: this.x(x), y: HEIGHT - 6, "text-anchor": anchor}, this.options.x(x)));
    }
    return nodes;
  }

  bands() {
    const height = HEIGHT - MARGIN.top - MARGIN.bottom;
    return (this.data.bands?.spans ?? []).map(span => {
      const [left, right] = span.map(x => this.x(Math.min(Math.max(x, this.domain.x[0]), this.domain.x[1])));
      return shape("rect", {class: "band", x: left, width: Math.max(1, right - left), y: MARGIN.top, height});
    });
  }

  line({points, style, gap, dots}) {
    let path = "";
    const marks = [];
    points.forEach(([x, y], index) => {
      const joined = index > 0 && !(gap && x - points[index - 1][0] > gap);
      const ends = index === points.length - 1 || Boolean(gap && points[index + 1][0] - x > gap);
      path += `${joined ? "L" : "M"}${this.x(x).toFixed(1)} ${this.y(y).toFixed(1)}`;
      if (dots || (!joined && ends)) marks.push(shape("circle", {class: style, cx: this.x(x), cy: this.y(y), r: dots ? 3 : 2}));
    });
    return [shape("path", {class: style, d: path}), ...marks];
  }

  mark() {
    if (this.cursor === null) return [];
    return [shape("line", {class: "cursor", x1: this.x(this.cursor), x2: this.x(this.cursor), y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom})];
  }

  // The legend, with values at the cursor or the newest ones.
  read() {
    const {x, y} = this.options;
    const items = this.data.series.map(({name, style, points}) => {
      const at = this.cursor === null ? points.at(-1) : points.findLast(point => point[0] <= this.cursor);
      return element("li", {}, element("i", {class: style}), `${name} `, element("b", {}, at ? y(at[1]) : "–"));
    });
    if (this.data.bands) items.push(element("li", {}, element("i", {class: "band"}), this.data.bands.name));
    if (this.cursor !== null) items.push(element("li", {}, this.options.at(x(this.cursor))));
    this.legend.replaceChildren(...items);
    this.svg.setAttribute("aria-label", this.data.series.map(({name, points}) => described(name, points, x, y)).join(". "));
  }

  point(left) {
    const nearest = (best, x) => Math.abs(this.x(x) - left) < Math.abs(this.x(best) - left) ? x : best;
    if (this.xs.length) this.move(this.xs.reduce(nearest, this.xs[0]));
  }

  key(event) {
    const direction = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!direction || !this.xs.length) return;
    event.preventDefault();
    const index = this.cursor === null ? this.xs.length - (direction < 0 ? 0 : 1) : this.xs.findLastIndex(x => x <= this.cursor);
    this.move(this.xs[Math.min(this.xs.length - 1, Math.max(0, index + direction))]);
  }

  move(cursor) {
    if (cursor === this.cursor) return;
    this.cursor = cursor;
    this.draw();
  }
}

function described(name, points, x, y) {
  if (!points.length) return `${name}: no value yet`;
  const [first, last] = [points[0], points.at(-1)];
  return `${name} from ${y(first[1])} at ${x(first[0])} to ${y(last[1])} at ${x(last[0])}`;
}

function thinned(points) {
  const every = Math.ceil(points.length / MOST_POINTS);
  return every <= 1 ? points : points.filter((point, index) => index % every === 0 || index === points.length - 1);
}

function extent(values) {
  return values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
}

function padded([low, high]) {
  const pad = 0.06 * (high - low) || 0.1 * Math.abs(high) || 1;
  return [low - pad, high + pad];
}

// Round numbers from low to high, about as many as asked for; round multiples of `step` where it is given.
function ticks(low, high, count, step = 0) {
  const rough = (high - low) / count || 1;
  const unit = step || 10 ** Math.floor(Math.log10(rough));
  const size = unit * ([1, 2, 5, 10, 15].find(factor => factor * unit >= 0.7 * rough) ?? 30);
  const marks = [];
  for (let mark = Math.ceil(low / size) * size; mark <= high + size * 1e-9; mark += size) marks.push(Number(mark.toPrecision(12)));
  return marks;
}
