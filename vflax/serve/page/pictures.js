// Files to pictures that the server takes.

import { config } from "./api.js";

const SENT_AS_THEY_ARE = ["image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp"];
const EXIF = "Exif\0\0";

// {blob, width, height} of a file: the file's own bytes where the server takes them, else drawn anew and as small as
// it must be. Throws an Error that names the file.
export async function prepare(file) {
  const limits = config();
  const pixels = limits?.max_image_pixels ?? Infinity;
  const bytes = Math.min(limits?.max_image_bytes ?? Infinity, share(limits));
  const bitmap = await createImageBitmap(file).catch(() => {
    throw new Error(`“${file.name}” is not a picture that this browser can read.`);
  });
  const { width, height } = bitmap;
  try {
    const fits = width * height <= pixels && file.size <= bytes;
    if (fits && SENT_AS_THEY_ARE.includes(file.type) && !(await hasExif(file))) {
      return { blob: file.slice(0, file.size, file.type), width, height };
    }
    let scale = Math.min(1, Math.sqrt(pixels / (width * height)));
    for (;;) {
      const drawn = await draw(bitmap, Math.max(1, Math.floor(width * scale)), Math.max(1, Math.floor(height * scale)), file);
      if (drawn.blob.size <= bytes || drawn.width * drawn.height < 4096) return drawn;
      scale *= 0.7;
    }
  } finally {
    bitmap.close();
  }
}

// What each picture may weigh so that as many as are allowed fit into a request as base64, beside the text.
function share(limits) {
  return limits ? (limits.max_request_bytes * 0.7) / Math.max(1, limits.max_images) : Infinity;
}

// The server does not turn a photo as its Exif data says, the browser does; and where a photo was taken is in there,
// too. So such a photo is drawn anew.
async function hasExif(file) {
  if (file.type !== "image/jpeg") return false;
  const start = new Uint8Array(await file.slice(0, 4096).arrayBuffer());
  return String.fromCharCode(...start).includes(EXIF);
}

async function draw(bitmap, width, height, file) {
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  const lossless = file.type !== "image/jpeg" && width === bitmap.width && width * height <= 1_000_000;
  if (!lossless) {
    context.fillStyle = "#fff"; // JPEG has no transparency, and black is what would be left
    context.fillRect(0, 0, width, height);
  }
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, lossless ? "image/png" : "image/jpeg", 0.92));
  if (!blob) throw new Error(`“${file.name}” (${bitmap.width} × ${bitmap.height}) is too large for this browser.`);
  return { blob, width, height };
}

export function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

// Addresses under which the document shows pictures: made once for each, given back all at once.
export class Addresses {
  #urls = new Map();

  of(record) {
    if (!this.#urls.has(record.id)) this.#urls.set(record.id, URL.createObjectURL(record.blob));
    return this.#urls.get(record.id);
  }

  free() {
    for (const url of this.#urls.values()) URL.revokeObjectURL(url);
    this.#urls.clear();
  }
}
