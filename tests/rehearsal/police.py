"""python -m tests.rehearsal.police: the cases of police_cases on a policed GPU, one JSON row each.

A process of its own: PyTorch is changed globally, and made to believe in a GPU before it is imported.
"""

from benchmarks import fake_gpu


def main() -> None:
    fake_gpu.install(flash=False)  # what flash-attn computes is compiled; torch's own packed attention is said plainly
    from tests.rehearsal import police_cases

    police_cases.run_all()


if __name__ == "__main__":
    main()
