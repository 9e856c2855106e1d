"""The paper's benchmarks (arXiv 2408.11396) by the names that lm-evaluation-harness has for them in each language.

Names are looked up in the index of the installed package: a name that it does not know is never handed to it.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_lpr.errors import UserError, nearest

# What FLORES and Belebele call the languages that have a code of two letters. Of a language that is written in several
# scripts it is the usual one.
FLORES_CODES = dict(
    pair.split(":")
    for pair in (
        "af:afr_Latn am:amh_Ethi ar:arb_Arab as:asm_Beng az:azj_Latn bg:bul_Cyrl bm:bam_Latn bn:ben_Beng bo:bod_Tibt "
        "ca:cat_Latn cs:ces_Latn da:dan_Latn de:deu_Latn el:ell_Grek en:eng_Latn es:spa_Latn et:est_Latn eu:eus_Latn "
        "fa:pes_Arab fi:fin_Latn fr:fra_Latn gl:glg_Latn gn:grn_Latn gu:guj_Gujr ha:hau_Latn he:heb_Hebr hi:hin_Deva "
        "hr:hrv_Latn ht:hat_Latn hu:hun_Latn hy:hye_Armn id:ind_Latn ig:ibo_Latn is:isl_Latn it:ita_Latn ja:jpn_Jpan "
        "jv:jav_Latn ka:kat_Geor kk:kaz_Cyrl km:khm_Khmr kn:kan_Knda ko:kor_Hang ky:kir_Cyrl lg:lug_Latn ln:lin_Latn "
        "lo:lao_Laoo lt:lit_Latn lv:lvs_Latn mg:plt_Latn mi:mri_Latn mk:mkd_Cyrl ml:mal_Mlym mn:khk_Cyrl mr:mar_Deva "
        "ms:zsm_Latn mt:mlt_Latn my:mya_Mymr nb:nob_Latn ne:npi_Deva nl:nld_Latn no:nob_Latn ny:nya_Latn om:gaz_Latn "
        "or:ory_Orya pa:pan_Guru pl:pol_Latn ps:pbt_Arab pt:por_Latn ro:ron_Latn ru:rus_Cyrl rw:kin_Latn sd:snd_Arab "
        "si:sin_Sinh sk:slk_Latn sl:slv_Latn sn:sna_Latn so:som_Latn sq:als_Latn sr:srp_Cyrl ss:ssw_Latn st:sot_Latn "
        "su:sun_Latn sv:swe_Latn sw:swh_Latn ta:tam_Taml te:tel_Telu tg:tgk_Cyrl th:tha_Thai ti:tir_Ethi tl:tgl_Latn "
        "tn:tsn_Latn tr:tur_Latn ts:tso_Latn uk:ukr_Cyrl ur:urd_Arab uz:uzn_Latn vi:vie_Latn wo:wol_Latn xh:xho_Latn "
        "yo:yor_Latn zh:zho_Hans zu:zul_Latn"
    ).split()
)
_TRANSLATED = [f"{bench}_bench_flores" for bench in ("basque", "catalan", "galician", "portuguese", "spanish")]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """How a benchmark is scored, and what its tasks are called.

    shots: solved examples before each question.
    english: of the original, where that has a name of its own.
    names: of a language, {xx} its code and {flores} that of FLORES. Each group holds the tasks of one data set; the
        first group that the harness has counts.
    """

    metric: str
    shots: int
    names: tuple[tuple[str, ...], ...]
    english: str | None = None


BENCHMARKS = {
    "arc": Benchmark(
        metric="acc_norm", shots=25, english="arc_challenge", names=(("arc_{xx}",), ("arc_challenge_mt_{xx}",))
    ),
    "hellaswag": Benchmark(metric="acc_norm", shots=10, english="hellaswag", names=(("hellaswag_{xx}",),)),
    "mmlu": Benchmark(metric="acc", shots=5, english="mmlu", names=(("m_mmlu_{xx}",), ("global_mmlu_full_{xx}",))),
    "belebele": Benchmark(metric="acc", shots=5, names=(("belebele_{flores}",),)),
    "flores": Benchmark(  # with English, in both directions
        metric="chrf",
        shots=8,
        names=(
            *((f"{prefix}_{{xx}}-en", f"{prefix}_en-{{xx}}") for prefix in _TRANSLATED),
            ("flores_{flores}-eng_Latn_prompt_1", "flores_eng_Latn-{flores}_prompt_1"),
        ),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark in a language; `name` is that of lm-evaluation-harness."""

    benchmark: str
    language: str
    role: str
    name: str


def tasks_of(
    benchmarks: Sequence[str], languages: Mapping[str, str], known: Collection[str]
) -> tuple[list[Task], list[str]]:
    """The tasks of some benchmarks in the languages of a recipe, and which of them there are not, as "arc in xx".

    Args:
        languages: their roles by their codes.
        known: names that the harness has.

    Raises:
        UserError: no such benchmark, or a language in which there is none of them.
    """
    for name in benchmarks:
        if name not in BENCHMARKS:
            raise UserError(f"--tasks: no benchmark '{name}'{nearest(name, BENCHMARKS)}")
    found, missing = list[Task](), list[str]()
    for language, role in languages.items():
        before = len(found)
        for benchmark in benchmarks:
            names = list(_names(BENCHMARKS[benchmark], language, known))
            found += [Task(benchmark=benchmark, language=language, role=role, name=name) for name in names]
            missing += [] if names else [f"{benchmark} in {language}"]
        if len(found) == before:
            there = [code for code in FLORES_CODES if any(any(_names(BENCHMARKS[b], code, known)) for b in benchmarks)]
            raise UserError(
                f"--tasks {','.join(benchmarks)}: lm-evaluation-harness has none of them in the language '{language}'"
                f"{nearest(language, there)}"
            )
    return found, missing


def _names(benchmark: Benchmark, language: str, known: Collection[str]) -> Iterator[str]:
    if language == "en" and benchmark.english:
        yield from {benchmark.english} & set(known)
        return
    codes = {"xx": language, "flores": FLORES_CODES.get(language, language)}
    groups = ([name.format(**codes) for name in names if name.format(**codes) in known] for names in benchmark.names)
    yield from next((names for names in groups if names), [])
