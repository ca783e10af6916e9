"""Soft targets: a teacher's distributions over a split, extracted once and read by any number of students."""
