// Draws which tokens of a picture are kept: dropped parts fade.

const WHOLE = [0, 0, 1, 1]; // top, left, bottom, right
const FADE = "rgb(255 255 255 / 80%)";
const UNSEEN = "rgb(128 128 128 / 92%)"; // outside the encoder's view
const EDGE = "rgb(11 92 173 / 85%)";
const LONGEST = 1024; // pixels

/** The grids of a report's `kept`, each with runs and box; null if positions are unknown. */
export function shape(kept) {
  if (kept.tiles) return kept.tiles;
  return kept.grid && [{ grid: kept.grid, runs: kept.runs, box: WHOLE }];
}

/**
 * Draw a picture and what is kept of it. A picture with tiles and an overview is drawn twice, side by side.
 *
 * @param canvas the canvas, which is resized.
 * @param picture an ImageBitmap.
 * @param kept `images[].kept` of a report; null to draw the picture alone.
 */
export function draw(canvas, picture, kept) {
  const grids = (kept && shape(kept)) || [];
  const overviews = grids.filter(({ box }) => !box);
  const tiles = grids.filter(({ box }) => box);
  const panels = [tiles, overviews].filter((panel) => panel.length);
  if (!panels.length) panels.push([]);
  const scale = Math.max(Math.min(1, LONGEST / Math.max(picture.width, picture.height)), 384 / picture.width);
  const [width, height] = [picture.width, picture.height].map((side) => Math.max(1, Math.round(side * scale)));
  canvas.width = width * panels.length;
  canvas.height = height;
  const context = canvas.getContext("2d");
  panels.forEach((panel, index) => {
    context.setTransform(1, 0, 0, 1, index * width, 0);
    context.fillStyle = "white"; // as the server fills what is transparent
    context.fillRect(0, 0, width, height);
    context.drawImage(picture, 0, 0, width, height);
    if (panel.length) drawPanel(context, panel, kept.view ?? WHOLE, width, height);
  });
}

function drawPanel(context, grids, [top, left, bottom, right], width, height) {
  context.fillStyle = UNSEEN;
  const seen = new Path2D();
  seen.rect(0, 0, width, height);
  seen.rect(left * width, top * height, (right - left) * width, (bottom - top) * height);
  context.fill(seen, "evenodd");
  context.fillStyle = FADE;
  context.strokeStyle = EDGE;
  for (const { grid, runs, box } of grids) {
    const [y0, x0, y1, x1] = within([top, left, bottom, right], box ?? WHOLE);
    const [rows, columns] = grid;
    const isKept = new Uint8Array(rows * columns);
    for (const [start, length] of runs) isKept.fill(1, start, start + length);
    const x = (column) => Math.round((x0 + ((x1 - x0) * column) / columns) * width);
    const y = (row) => Math.round((y0 + ((y1 - y0) * row) / rows) * height);
    const all = isKept.every(Boolean);
    isKept.forEach((kept, cell) => {
      const [row, column] = [Math.floor(cell / columns), cell % columns];
      const [across, down] = [x(column + 1) - x(column), y(row + 1) - y(row)];
      if (!kept) context.fillRect(x(column), y(row), across, down);
      else if (!all) context.strokeRect(x(column) + 0.5, y(row) + 0.5, across - 1, down - 1);
    });
  }
}

/** A box relative to a view as one relative to the picture. */
function within([top, left, bottom, right], [y0, x0, y1, x1]) {
  const [height, width] = [bottom - top, right - left];
  return [top + y0 * height, left + x0 * width, top + y1 * height, left + x1 * width];
}
