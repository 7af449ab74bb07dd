"""Energy is the counter's difference over the window, and empty where a device has no counter."""

import time

import pytest

from tunemap.measure.energy import EnergyWindow, cost, power_limit_watts


@pytest.fixture
def counters(driver):
    """Millijoules per GPU, moved by the test."""
    millijoules = {0: 1_000_000, 1: 5_000_000}
    driver.answers["nvmlDeviceGetTotalEnergyConsumption"] = millijoules.__getitem__
    driver.answers["nvmlDeviceGetEnforcedPowerLimit"] = {0: 300_000, 1: 400_000}.__getitem__
    return millijoules


def test_energy_is_the_sum_of_the_counters_differences(counters):
    with EnergyWindow(["cuda:0", "cuda:1"]) as window:
        counters[0] += 2_500
        counters[1] += 1_000
        time.sleep(0.02)
    assert window.reading.energy_joules == pytest.approx(3.5)
    assert window.reading.seconds >= 0.02
    assert window.reading.power_limit_joules == pytest.approx(700 * window.reading.seconds)


def test_only_the_devices_of_the_run_count(counters):
    with EnergyWindow(["cuda:1"]) as window:
        counters[0] += 9_000
        counters[1] += 1_000
    assert window.reading.energy_joules == 1.0


def test_without_a_counter_the_estimate_does_not_take_its_place(driver):
    driver.answers["nvmlDeviceGetEnforcedPowerLimit"] = lambda handle: 70_000
    with EnergyWindow(["cuda:0"]) as window:
        pass
    assert window.reading.energy_joules is None
    assert window.reading.power_limit_joules >= 0


def test_one_device_without_a_counter_leaves_the_sum_empty(counters):
    del counters[1]
    counters[1] = None
    with EnergyWindow(["cuda:0", "cuda:1"]) as window:
        pass
    assert window.reading.energy_joules is None


@pytest.mark.parametrize("devices", [["cpu"], [], ["cuda:0", "cpu"]])
def test_a_cpu_has_no_energy_and_never_zero(counters, devices):
    with EnergyWindow(devices) as window:
        pass
    assert window.reading.energy_joules is None
    assert window.reading.power_limit_joules is None


def test_without_a_driver_all_is_empty(no_driver):
    with EnergyWindow(["cuda:0"]) as window:
        pass
    assert window.reading.energy_joules is None
    assert power_limit_watts(["cuda:0"]) is None


def test_a_window_is_read_even_if_the_work_fails(counters):
    window = EnergyWindow(["cuda:0"])
    with pytest.raises(KeyError), window:
        raise KeyError
    assert window.reading.energy_joules == 0.0


def test_cost_is_price_times_device_hours():
    assert cost(1800, 2.0, devices=4) == 4.0
    assert cost(1800, None) is None
