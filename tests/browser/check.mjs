// Opens pages in headless Chromium and tells what is wrong with them: messages on the console, requests to anything but
// the page's own file, a page wider than its window, and what axe-core finds. Takes screenshots, and a PDF as printed.
//
//   node check.mjs --modules FOLDER --chromium FILE [--pictures FOLDER] PAGE.html...
//
// FOLDER holds axe-core and puppeteer-core, as npm installs them. Prints a JSON list of findings; exits with 1 where
// there are any.

import { createRequire } from "node:module";
import { mkdirSync, readFileSync } from "node:fs";
import path from "node:path";
import { parseArgs } from "node:util";
import { pathToFileURL } from "node:url";

const { values: given, positionals: pages } = parseArgs({
  allowPositionals: true,
  options: { modules: { type: "string" }, chromium: { type: "string" }, pictures: { type: "string" } },
});
const require = createRequire(path.resolve(given.modules, "anything.js"));
const puppeteer = require("puppeteer-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

const RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"];
// The width of A4 between margins of 1 cm, at 96 pixels per inch.
const PAPER = 718;
const VIEWS = ["light", "dark"].flatMap((scheme) => [
  { name: `phone-${scheme}`, width: 390, height: 844, scheme, media: "screen" },
  { name: `desktop-${scheme}`, width: 1280, height: 900, scheme, media: "screen" },
  { name: `print-${scheme}`, width: PAPER, height: 1000, scheme, media: "print" },
]);

async function check(browser, file, view, number) {
  const page = await browser.newPage();
  const found = [];
  const tell = (what) => found.push({ page: file, view: view.name, what });
  const url = pathToFileURL(path.resolve(file)).href;
  page.on("console", (message) => tell(`console: ${message.type()}: ${message.text()}`));
  page.on("pageerror", (error) => tell(`script error: ${error.message}`));
  page.on("request", (request) => {
    if (request.url() !== url && !request.url().startsWith("data:")) tell(`request: ${request.url()}`);
  });
  await page.setViewport({ width: view.width, height: view.height, deviceScaleFactor: view.width < 700 ? 2 : 1 });
  // In one call: of two, each forgets what the other asked for.
  const session = await page.createCDPSession();
  const features = [{ name: "prefers-color-scheme", value: view.scheme }];
  await session.send("Emulation.setEmulatedMedia", { media: view.media, features });
  await page.goto(url, { waitUntil: "load" });
  const query = `${view.media} and (prefers-color-scheme: ${view.scheme})`;
  if (!(await page.evaluate((text) => matchMedia(text).matches, query))) tell(`view: not shown as ${query}`);
  if (view.media === "screen") await page.$$eval("details", (all) => all.forEach((each) => (each.open = true)));

  const width = await page.evaluate(() => document.documentElement.scrollWidth);
  if (width > view.width) tell(`overflow: the page is ${width} px wide in a window of ${view.width} px`);
  const blank = await page.$$eval("img", (all) => all.filter((each) => each.naturalWidth === 0).length);
  if (blank > 0) tell(`images: ${blank} cannot be shown`);

  await page.evaluate(axe);
  const result = await page.evaluate((rules) => window.axe.run(document, { runOnly: rules }), RULES);
  for (const { id, help, nodes } of result.violations) {
    const where = nodes.slice(0, 3).map((node) => node.html.slice(0, 160));
    tell(`axe: ${id}: ${help}: ${nodes.length} times, like ${where.join(" | ")}`);
  }
  if (result.passes.length === 0) tell("axe: nothing was checked");

  if (given.pictures) {
    const stem = path.join(given.pictures, `${number}-${view.name}`);
    await page.screenshot({ path: `${stem}.png`, fullPage: true });
    if (view.name === "print-light") await page.pdf({ path: `${stem}.pdf`, format: "A4", margin: margins() });
  }
  await page.close();
  return found;
}

function margins() {
  return Object.fromEntries(["top", "bottom", "left", "right"].map((side) => [side, "1cm"]));
}

if (pages.length === 0) throw new Error("no page given");
if (given.pictures) mkdirSync(given.pictures, { recursive: true });
// Pages are the ones that this project has made; Chromium's sandbox needs rights that containers do not give.
const browser = await puppeteer.launch({ executablePath: given.chromium, args: ["--no-sandbox"] });
const found = [];
try {
  for (const [number, file] of pages.entries()) {
    for (const view of VIEWS) found.push(...(await check(browser, file, view, number + 1)));
  }
} finally {
  await browser.close();
}
console.log(JSON.stringify(found, null, 1));
process.exitCode = found.length > 0 ? 1 : 0;
