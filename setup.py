"""Packaging only: the top-level folders are the packages of `hocket` (everything else is in pyproject.toml)."""

from setuptools import find_packages, setup

FOLDERS = ("bus", "cluster", "lab", "router", "transport", "workers")
found = [package for folder in FOLDERS for package in find_packages(include=[folder, f"{folder}.*"])]

setup(
    packages=[f"hocket.{package}" for package in found],
    package_dir={f"hocket.{folder}": folder for folder in FOLDERS},
    package_data={"hocket.lab": ["profiles/*.json"]},
)
