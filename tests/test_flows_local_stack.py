"""Ports for servers that begin later: different ones, and nobody else gets them meanwhile."""

import socket

import pytest

from flows import local_stack


def test_the_kernel_hands_none_of_them_out_before_their_servers_begin():
    ports = local_stack.free_ports(5)
    assert len(set(ports)) == 5
    assert max(ports) < local_stack._lowest_handed_out()


def test_one_that_somebody_listens_on_is_passed_over(monkeypatch):
    (taken,) = local_stack.free_ports(1)
    monkeypatch.setattr(local_stack, "OWN_PORT", taken)
    monkeypatch.setattr(local_stack, "_lowest_handed_out", lambda: taken + 1)
    with socket.create_server(("127.0.0.1", taken)):
        assert taken not in local_stack.free_ports(3)


@pytest.mark.parametrize("lowest", [1024, local_stack.OWN_PORT])
def test_where_the_kernel_hands_all_of_them_out_there_are_ports_too(monkeypatch, lowest):
    monkeypatch.setattr(local_stack, "_lowest_handed_out", lambda: lowest)
    assert len({*local_stack.free_ports(5)}) == 5
