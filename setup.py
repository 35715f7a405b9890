"""Packaging; `pip install .` gives fairseq's `--user-dir xmoe_fairseq` from any folder."""

from setuptools import find_packages, setup

setup(
    name="xmoe_fairseq",
    version="0.1.0",
    description="Adaptive-computation Mixture-of-Experts translation models for stock fairseq",
    license="MIT",
    packages=[*find_packages(include=["xmoe_fairseq", "xmoe_fairseq.*"]), "hydra_plugins"],
    package_data={"xmoe_fairseq.render": ["templates/*"]},
    python_requires=">=3.11,<3.13",
    install_requires=[
        "torch>=2.6",
        "fairseq-fixed==0.12.3.1",
        "sentencepiece>=0.2",
        "sacrebleu>=2.3",
        "tabulate>=0.9",
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "pyyaml>=6",
        "scipy>=1.11",
        "tqdm>=4.60",
    ],
    entry_points={"console_scripts": ["xmoe=xmoe_fairseq.cli:main"]},
    extras_require={
        "data": ["babel>=2.14"],
        "languages": ["py3langid>=0.4", "langcodes>=3.4"],
        "fsdp": ["fairscale==0.4.13"],
    },
)
