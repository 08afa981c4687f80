"""Nodes die while a job trains: does it go on with the same bits, how soon, and what does it cost?"""
