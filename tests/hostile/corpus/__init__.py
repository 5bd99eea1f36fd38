"""Attacks as data: who carries them out are the tests beside this folder and `test_proof`, which weakens one defence each."""
