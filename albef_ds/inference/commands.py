"""A trained model on the command line: python -m albef_ds convert | answer | match | classify | search | explain |
pseudo-targets | serve.

Images that cannot be read are named on standard error and passed over; where none can, the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

Line = Callable[[dict], str | list[str]]  # a result as people read it
MODEL_HELP = "RUN, a .pth or .safetensors file, a folder in Hugging Face's form, or owner/name of the hub"


def add_inference_commands(commands) -> None:
    """Adds the commands to `commands` (of add_subparsers)."""
    convert = commands.add_parser("convert", help="a checkpoint to another form: .pth, .safetensors, Hugging Face's")
    convert.add_argument("source", type=Path, help=f"RUN/checkpoints/step_…, {MODEL_HELP}")
    convert.add_argument("out", type=Path, help=".pth (the reference's form), .safetensors, or a folder to make")
    convert.add_argument("--without-teacher", action="store_true", help="leave out momentum copies and queues")
    convert.add_argument("--tokenizer", help="vocab.txt, a folder or a name, where the source does not say")
    convert.add_argument("--config", help="the recipe of a bare file of weights, where its heads are not width / 64")
    convert.add_argument("--licence", default="unknown", help="of the weights, for the folder's model card")
    convert.set_defaults(run=run_convert)

    answer = _command(commands, "answer", run_answer, "answer a question about images")
    answer.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="files or folders")
    answer.add_argument("--question", required=True)
    answer.add_argument("--answers", type=Path, help="JSON list to choose from (default: written freely)")
    answer.add_argument("--top", type=int, default=1, help="answers to each image")
    answer.add_argument("--beams", type=int, default=3)

    match = _command(commands, "match", run_match, "how probably texts and images belong together")
    match.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="files or folders")
    match.add_argument("--text", nargs="+", required=True)

    classify = _command(
        commands, "classify", run_classify, "label sentences about an image (entailment) or two (NLVR2)"
    )
    classify.add_argument(
        "--image", nargs="+", type=Path, required=True, dest="images", help="files or folders; NLVR2: left and right"
    )
    classify.add_argument("--text", nargs="+", required=True)

    search = _command(commands, "search", run_search, "find images of a folder by a text or by an image")
    search.add_argument("folder", type=Path)
    query = search.add_mutually_exclusive_group(required=True)
    query.add_argument("--text")
    query.add_argument("--image", type=Path)
    search.add_argument("--top", type=int, default=10)

    explain = _command(commands, "explain", run_explain, "show where in an image each word is found")
    explain.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="files or folders")
    explain.add_argument("--text", required=True)
    explain.add_argument("--out", type=Path, required=True, help="a .png file, or a folder for several")
    explain.add_argument("--by", choices=("itm", "itc"), default="itm", help="itm: each word; itc: the text as a whole")
    explain.add_argument("--layer", type=int, help="whose attention is looked at (default: the third fusion layer)")

    targets = _command(commands, "pseudo-targets", run_pseudo_targets, "what the momentum teacher teaches")
    targets.add_argument("--data", type=Path, required=True, help='a JSON list of {"image": …, "caption": …}')
    targets.add_argument("--image-root", type=Path, help="what relative paths start from (default: beside the list)")
    targets.add_argument("--out", type=Path, required=True, help="a .png file")
    targets.add_argument("--pairs", type=int, default=6, help="how many of the list are shown")
    targets.add_argument("--among", type=int, default=256, help="how many of the list are candidates")
    targets.add_argument("--word", help="the word to mask where a caption has it (default: what it is least sure of)")

    serve = _command(commands, "serve", run_serve, "a page for all of this, for this machine alone", as_json=False)
    serve.add_argument("--images", type=Path, required=True, help="the folder to search; nothing else is served")
    serve.add_argument("--answering", help="a VQA model, for the tab that answers questions")
    serve.add_argument("--host", default="127.0.0.1", help="0.0.0.0: every machine that reaches this one may use it")
    serve.add_argument("--port", type=int, default=7860)


def _command(commands, name: str, run: Callable, words: str, as_json: bool = True) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=words)
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("--tokenizer", help="vocab.txt, a folder or a name, where the model does not say")
    parser.add_argument("--config", help="the recipe of a bare file of weights, where its heads are not width / 64")
    parser.add_argument("--device", help="cpu, cuda, … (default: a GPU where there is one)")
    parser.add_argument("--batch", type=int, default=32, help="images of a forward pass")
    if as_json:
        parser.add_argument("--json", action="store_true", help="for machines")
    parser.set_defaults(run=_guarded(run))
    return parser


def run_convert(args: argparse.Namespace) -> None:
    from albef_ds.inference.forms import convert

    options = {"tokenizer": args.tokenizer, "config": args.config, "licence": args.licence}
    print(convert(args.source, args.out, with_teacher=not args.without_teacher, **options))


def run_answer(args: argparse.Namespace) -> int:
    from albef_ds.data.annotations import load_list

    model = _load(args)
    listed = None if args.answers is None else [str(a) for a in load_list(args.answers)]

    def answer(paths, pictures):
        best = model.answer(pictures, args.question, listed, args.top, args.beams, args.batch)
        return [{"image": str(p), "answers": [asdict(a) for a in b]} for p, b in zip(paths, best, strict=True)]

    def line(result: dict) -> str:
        said = ", ".join(f"{a['text']} ({a['probability']:.1%})" for a in result["answers"])
        return f"{result['image']}: {said}"

    return _each(args, answer, line, {"question": args.question})


def run_match(args: argparse.Namespace) -> int:
    model = _load(args)

    def match(paths, pictures):
        shares = [model.match(pictures, text, args.batch).tolist() for text in args.text]
        return [
            {"image": str(p), "match": dict(zip(args.text, row, strict=True))}
            for p, row in zip(paths, zip(*shares, strict=True), strict=True)
        ]

    def line(result: dict) -> list[str]:
        return [f"{share:7.1%}  {result['image']}: {text}" for text, share in result["match"].items()]

    return _each(args, match, line, {"texts": args.text})


def run_classify(args: argparse.Namespace) -> int:
    from albef_ds.inference.inputs import listed
    from albef_ds.inference.model import UseError

    model = _load(args)
    args.images = listed(args.images)
    two = model.task == "nlvr"
    if two and len(args.images) != 2:
        raise UseError(f"{args.model}: NLVR2 is about two images, --image LEFT RIGHT; got {len(args.images)}")

    def classify(paths, pictures):
        if two:
            found = [model.classify(pictures, args.text, args.batch)] if len(paths) == 2 else []
            shown = [{"images": [str(path) for path in paths]}]
        else:
            found = zip(*(model.classify(pictures, text, args.batch) for text in args.text), strict=True)
            shown = [{"image": str(path)} for path in paths]
        return [
            {**of, "text": text, **asdict(label)}
            for of, labels in zip(shown, found, strict=False)
            for text, label in zip(args.text, labels, strict=True)
        ]

    def line(result: dict) -> str:
        likeliest_first = sorted(result["probabilities"].items(), key=lambda share: -share[1])
        said = ", ".join(f"{label} {share:.1%}" for label, share in likeliest_first)
        return f"{said}  {result.get('image') or ' and '.join(result['images'])}: {result['text']}"

    return _each(args, classify, line, {"texts": args.text}, 2 if two else args.batch)


def run_search(args: argparse.Namespace) -> int:
    from albef_ds.inference.search import ImageIndex

    model = _load(args)
    index = ImageIndex.build(model, args.folder, args.batch)
    if args.text is not None:
        found = index.by_text(model, args.text, args.top)
    else:
        found = index.by_image(model, args.image, args.top)
    results = [{"image": str(f.image), "similarity": f.similarity} for f in found]
    query = {"text": args.text} if args.text is not None else {"image": str(args.image)}
    _tell(args, results, lambda r: f"{r['similarity']:+.3f}  {r['image']}", index.faults, query)
    return 0


def run_explain(args: argparse.Namespace) -> int:
    from albef_ds.inference.explain import sheet
    from albef_ds.inference.inputs import listed
    from albef_ds.inference.model import UseError

    model = _load(args)
    single = args.out.suffix.lower() == ".png"
    written: set[Path] = set()

    def explain(paths, pictures):
        results = []
        for path, picture in zip(paths, pictures, strict=True):
            heatmap = model.heatmaps(picture, args.text, args.by, args.layer)
            out = args.out if single else _unused(args.out / f"{path.stem}.png", written)
            sheet(picture, args.text, heatmap, out)
            words = [{"word": w, "map": m.tolist()} for w, m in zip(heatmap.words, heatmap.maps, strict=True)]
            results.append(
                {
                    "image": str(path),
                    "picture": str(out),
                    "score": heatmap.score,
                    "whole": heatmap.whole.tolist(),
                    "words": words,
                }
            )
        return results

    if single and len(listed(args.images)) > 1:
        raise UseError(f"--out {args.out}: several images need a folder")
    return _each(args, explain, lambda r: r["picture"], {"text": args.text, "by": args.by})


def run_pseudo_targets(args: argparse.Namespace) -> int:
    from albef_ds.inference.teacher_view import draw, load_teacher, pseudo_targets, read_examples

    teacher = load_teacher(args.model, config=args.config, tokenizer=args.tokenizer, device=args.device)
    examples, faults = read_examples(args.data, args.image_root, args.among)
    views = pseudo_targets(teacher, examples, args.pairs, args.word, args.batch)
    draw(views, args.out)
    _tell(args, [view.plain() for view in views], lambda view: view["masked"], faults, {"picture": str(args.out)})
    return 0


def run_serve(args: argparse.Namespace) -> int:
    from albef_ds.inference.page import serve

    model = _load(args)
    answering = None
    if args.answering:
        from albef_ds.inference.loading import load

        answering = load(args.answering, device=args.device)
    serve(model, args.images, answering, args.host, args.port)
    return 0


# -- what they share ---------------------------------------------------------------------------------------------------


def _guarded(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    def guarded(args: argparse.Namespace) -> int:
        from albef_ds.data.images import ImageError
        from albef_ds.inference.model import UseError

        logging.basicConfig(level=logging.WARNING, format="albef_ds: %(message)s")
        try:
            return run(args)
        except (ImageError, UseError) as error:
            print(f"albef_ds: {_line(str(error))}", file=sys.stderr)
            return 1 if isinstance(error, ImageError) else 2

    return guarded


def _load(args: argparse.Namespace):
    from albef_ds.inference.loading import load

    return load(args.model, config=args.config, tokenizer=args.tokenizer, device=args.device)


def _each(args: argparse.Namespace, use: Callable, line: Line, query: dict, batch: int | None = None) -> int:
    """`use` of (paths, pictures), batch by batch, to their results; 1 where there is none, no image being readable."""
    from albef_ds.inference.inputs import Readable, listed

    source = Readable(listed(args.images), batch or args.batch)
    results = [result for paths, pictures in source for result in use(paths, pictures)]
    _tell(args, results, line, source.faults, query)
    return 0 if results else 1


def _tell(args: argparse.Namespace, results: list, line: Line, faults: Iterable, query: dict) -> None:
    for fault in faults:
        print(f"albef_ds: left out: {_line(str(fault))}", file=sys.stderr)
    if args.json:
        left_out = [{"image": fault.key, "reason": fault.reason} for fault in faults]
        print(json.dumps({"model": args.model, **query, "results": results, "left_out": left_out}, indent=1))
        return
    for result in results:
        lines = line(result)
        print("\n".join(_line(part) for part in ([lines] if isinstance(lines, str) else lines)))


def _line(text: str) -> str:
    """What a terminal can show: file names are anybody's, control characters in them too."""
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
    encoding = sys.stdout.encoding or "utf-8"
    return plain.encode(encoding, "backslashreplace").decode(encoding)


def _unused(path: Path, written: set[Path]) -> Path:
    """A name for every image: two folders may hold the same."""
    candidate, count = path, 1
    while candidate in written:
        count += 1
        candidate = path.with_stem(f"{path.stem}_{count}")
    written.add(candidate)
    return candidate
