"""Installs albef_ds; the folder kernels/ becomes the package albef_ds.kernels (see README)."""

from setuptools import find_packages, setup

RUNTIME = [
    "torch>=2.6,<2.13",
    "torchvision>=0.21",
    "deepspeed>=0.19.4,<0.20",
    "timm>=1.0.20",
    "transformers>=4.48,<6",
    "tokenizers>=0.21",
    "safetensors>=0.4",
    "pydantic>=2.6",
    "pyyaml>=6",
    "numpy>=1.26",
    "pillow>=10.3",
    "tqdm>=4.66",
    "psutil>=5.9",
    "tensorboard>=2.16",
    "matplotlib>=3.8",
    "ninja",  # DeepSpeed builds its CPU communication operator with it
]

DALI = ["nvidia-dali-cuda130>=2.4,<3; platform_system == 'Linux' and platform_machine == 'x86_64'"]
PARQUET = ["pyarrow>=15"]
REMOTE = ["fsspec[http]>=2024.2"]
PAGE = ["gradio>=6.31,<7"]  # gradio 6.31 wants Pillow older than 13

setup(
    name="albef_ds",
    version="0.1.0",
    description="ALBEF (Align before Fuse) on DeepSpeed ZeRO-2, Triton, FlashAttention and DALI",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # A top-level package called `kernels` would collide with Hugging Face's of that name.
    packages=[*find_packages(include=["albef_ds", "albef_ds.*"]), "albef_ds.kernels", "albef_ds.ds_configs"],
    package_dir={"albef_ds": "albef_ds", "albef_ds.kernels": "kernels", "albef_ds.ds_configs": "ds_configs"},
    package_data={"albef_ds": ["configs/*.yaml"], "albef_ds.ds_configs": ["*.json", "*.md", "launch/*"]},
    install_requires=RUNTIME,
    extras_require={
        "dali": DALI,
        "dali-cuda12": [DALI[0].replace("cuda130", "cuda120")],
        "flash": ["flash-attn>=2.7"],
        "parquet": PARQUET,  # Parquet lists for `albef_ds data pack`
        "page": PAGE,  # `albef_ds serve`
        "fuzz": ["atheris>=2.3; platform_system == 'Linux' and platform_machine == 'x86_64'"],  # `make fuzz`
        "remote": REMOTE,  # shards from URLs; s3:// also needs s3fs
        "dev": [
            *DALI,
            *PARQUET,
            *REMOTE,
            *PAGE,
            "playwright>=1.50",  # drives a browser in tests/inference/test_page.py
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist>=3.6",  # `pytest tests/kernels -n 8`: kernels are compiled by several processes
            "hypothesis>=6.100",
            "ruff>=0.8",
            "pre-commit",
            "scipy",
            "numpy<2.4",  # Triton 3.6's interpreter, which runs the kernel tests on a CPU, fails with numpy 2.4
            "webdataset",  # the loader benchmark's rival
            "torchmetrics>=1.4",  # retrieval recall is compared with it
            "scikit-image",  # photographs for tests and benchmarks
        ],
    },
)
