"""What stands in Redis after each operation is what Go leaves there, on every topology; where Go has a flaw, it is not.

Golden scenes are replayed by test_golden.py; each transition is tested in tests/broker. The rows of parity.md, section 20,
whose operations exist, and the test that shows the better behaviour (test_flaws.py holds this table against the tests):

    F1   an idle server notices a task at once          tests/conformance/test_flaws.py::test_an_idle_server_is_woken
    F3   a queue removed elsewhere is registered again   tests/broker/test_enqueue.py::test_a_queue_that_somebody_removes_is_registered_again
    F4   a taken ID leaves no lock                       tests/broker/test_enqueue.py::test_a_taken_id_leaves_no_lock
    F8   a scheduled task keeps its group                tests/broker/test_forward.py::test_a_scheduled_group_member_joins_its_group
    F9   a returning member's group is registered        tests/broker/test_forward.py::test_a_returning_member_s_group_is_registered_again
    F11  a batch has a verdict per task, all options     tests/broker/test_enqueue.py::test_a_batch_of_the_client
    F12  a timeout below a second is rounded up          tests/conformance/test_golden.py::test_the_key_space_is_that_of_the_recording
    F17  a task that goes back says since when it waits  tests/broker/test_finish.py::test_state_after
    F21  a timeout really ends the handler               tests/conformance/test_flaws.py::test_a_timeout_ends_the_handler
    F22  an error handler that raises ends nothing       tests/conformance/test_flaws.py::test_an_error_handler_may_raise
    F26  a URI keeps the user name and fills in the port tests/test_config.py::test_uri_stands_for_an_option
    F27  a crashed worker's task runs again soon         tests/broker/test_recovery.py::test_the_task_of_a_silent_owner_goes_back
    F28  a result does not bring back a task             tests/broker/test_results.py::test_a_task_that_is_gone_stays_gone
    F31  an outcome outlives an outage                   tests/conformance/test_flaws.py::test_an_outcome_outlives_an_outage
"""  # noqa: E501  (a row is a line)
