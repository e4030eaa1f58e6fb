"""Costs: what a run will take, before it starts: time, memory and disk, stage by stage."""
