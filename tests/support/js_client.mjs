// What the Hub's client for JavaScript does with the loopback Hub; prints the results as JSON.
// CRDIFF_TEST_NODE_MODULES names the folder that has @huggingface/hub; the argument is a JSON object.
import { createHash } from "node:crypto";
import path from "node:path";
import { pathToFileURL } from "node:url";

const modules = process.env.CRDIFF_TEST_NODE_MODULES;
const hub = await import(pathToFileURL(path.join(modules, "@huggingface/hub/dist/index.mjs")));
const { hubUrl, accessToken, repo, file, target } = JSON.parse(process.argv[2]);
const from = { repo, hubUrl, accessToken };
const to = { repo: target, hubUrl, accessToken };

const digest = async (blob) =>
	createHash("sha256").update(Buffer.from(await blob.arrayBuffer())).digest("hex");
const status = (promise) => promise.then(() => null, (error) => error.statusCode);
const listed = [];
for await (const entry of hub.listFiles({ ...from, recursive: true })) {
	listed.push([entry.type, entry.path, entry.lfs?.oid ?? null]);
}
const metadata = await hub.parseSafetensorsMetadata({ ...from, path: file });
const created = await hub.createRepo(to);
const content = Buffer.alloc(3000, "safetensors");
const uploaded = await hub.uploadFiles({
	...to,
	useXet: false,
	commitTitle: "From JavaScript",
	files: [
		{ path: "model.safetensors", content: new Blob([content]) },
		{ path: "README.md", content: new Blob(["# Hello\n"]) },
	],
});
const pull = await hub.uploadFiles({
	...to,
	useXet: false,
	commitTitle: "A pull request",
	isPullRequest: true,
	files: [{ path: "note.txt", content: new Blob(["note"]) }],
});
console.log(
	JSON.stringify({
		listed,
		downloaded: await digest(await hub.downloadFile({ ...from, path: file })),
		absent: await hub.downloadFile({ ...from, path: "nothing.txt" }),
		tensors: Object.keys(metadata.header).filter((name) => name !== "__metadata__").length,
		created,
		again: await status(hub.createRepo(to)),
		content: createHash("sha256").update(content).digest("hex"),
		commit: uploaded.commit.oid,
		pull: pull.pullRequestUrl,
	}),
);
