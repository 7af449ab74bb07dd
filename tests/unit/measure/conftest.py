"""A driver made of paper: stands for nvidia-ml-py where a test needs GPUs."""

import sys
import types

import pytest


class NVMLError(Exception):
    pass


class PaperDriver(types.ModuleType):
    """Two GPUs; `answers` holds what each question returns per GPU index, and a missing one is unsupported."""

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    NVML_P2P_CAPS_INDEX_NVLINK, NVML_P2P_STATUS_OK, NVML_NVLINK_MAX_LINKS, NVML_FEATURE_ENABLED = 2, 0, 18, 1

    def __init__(self):
        super().__init__("pynvml")
        self.open = 0
        self.answers = {}

    def nvmlInit(self):  # noqa: N802
        self.open += 1

    def nvmlShutdown(self):  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetCount(self):  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):  # noqa: N802
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        return {"GPU-aaaa": 0, "GPU-bbbb": 1}.get(uuid) if uuid in ("GPU-aaaa", "GPU-bbbb") else self.refuse()

    def refuse(self):
        raise NVMLError("Not Supported")

    def __getattr__(self, question):
        if question.startswith("nvml"):
            answers = self.__dict__.get("answers", {})
            if question in answers:
                return lambda *arguments: answers[question](*arguments)
            return lambda *arguments: self.refuse()
        raise AttributeError(question)


@pytest.fixture
def driver(monkeypatch):
    """The paper driver in the place of pynvml; every session opened on it must have been closed."""
    paper = PaperDriver()
    monkeypatch.setitem(sys.modules, "pynvml", paper)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    yield paper
    assert paper.open == 0


@pytest.fixture
def no_driver(monkeypatch):
    """A machine without an NVIDIA driver."""
    paper = PaperDriver()
    paper.nvmlInit = paper.refuse
    monkeypatch.setitem(sys.modules, "pynvml", paper)
