"""Everything ONNX: conversion, reading, writing, export, running."""
