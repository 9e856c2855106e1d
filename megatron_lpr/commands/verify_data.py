"""`megatron-lpr verify-data`: every byte of the corpora against their manifest."""

import argparse

from megatron_lpr.commands.command import Command
from megatron_lpr.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="MANIFEST_OR_RECIPE", help="manifest.yaml, or a recipe that names it")
    parser.add_argument("--workers", metavar="N", type=int, default=0, help="files read at once (0: one per core)")


def run(options: argparse.Namespace) -> None:
    """Read every file of every corpus of a manifest, and compare it with its digests."""
    from megatron_lpr.data.corpus import verify_data as data
    from megatron_lpr.data.corpus.manifest import Manifest
    from megatron_lpr.files.cores import usable_cores

    if options.workers < 0:
        raise UserError(f"--workers: {options.workers}; give a number of files to read at once, or 0 for one per core")
    manifest = Manifest.load(data.find_manifest(options.path), check_files=False)
    failed = []
    workers = options.workers or usable_cores()
    for file, complaint in data.verify_data(manifest, workers=workers, show=True):
        print(f"{file}: {complaint or 'ok'}", flush=True)
        if complaint:
            failed.append(file)
    if failed:
        raise UserError(f"{manifest.path}: {len(failed)} of its files are not what was written: {', '.join(failed)}")


COMMAND = Command(
    "verify-data", "compare every byte of the corpora with the digests in their manifest", add_arguments, run, place=2
)
