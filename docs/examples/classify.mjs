// Ask a server from JavaScript: `node classify.mjs [URL] TEXT...`. Nothing to install: fetch is built in.

const [first, ...rest] = process.argv.slice(2);
const given = /^https?:\/\//.test(first ?? "");
const url = given ? first : "http://127.0.0.1:8000";
const texts = given ? rest : [first, ...rest];

async function classify(input, attempts = 5) {
  const response = await fetch(`${url}/classify`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ input, quality: "balanced" }),
  });
  const busy = response.status === 429 || response.status === 503;
  if (busy && attempts > 1) {
    const seconds = Number(response.headers.get("retry-after") ?? 1);
    await new Promise((resolve) => setTimeout(resolve, 1000 * seconds * (1 + Math.random() / 4)));
    return classify(input, attempts - 1);
  }
  const body = await response.json();
  if (!response.ok) throw new Error(`${body.error.code}: ${body.error.message}`);
  return body.data;
}

try {
  for (const item of await classify(texts)) {
    if (item.error) console.log(`failed: ${item.error.message}`);
    else console.log(`${item.label} ${item.score.toFixed(3)} with ${item.heads.used} of ${item.heads.total} heads`);
  }
} catch (error) {
  console.error(String(error.message ?? error));
  process.exitCode = 1;
}
