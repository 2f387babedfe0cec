"""gRPC: conversion between core values and messages, the fleet of ranks, status mapping."""
