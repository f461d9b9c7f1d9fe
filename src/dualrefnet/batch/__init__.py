"""Prediction of many lesions into one CSV, on one machine or on Ray."""
