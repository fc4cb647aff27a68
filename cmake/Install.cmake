# `cmake --install build/release --prefix PREFIX`: the programs, what they say of themselves, the interfaces, the demo model.
include(GNUInstallDirs)

install(TARGETS tandem tandem_router tandem_prefill_worker tandem_decode_worker)
install(FILES LICENSE README.md CHANGELOG.md DESTINATION ${CMAKE_INSTALL_DOCDIR})
install(DIRECTORY docs DESTINATION ${CMAKE_INSTALL_DOCDIR})
install(DIRECTORY deploy/systemd deploy/compose deploy/kubernetes deploy/prometheus deploy/dashboards
        DESTINATION ${CMAKE_INSTALL_DOCDIR} USE_SOURCE_PERMISSIONS
        PATTERN .env EXCLUDE PATTERN secrets EXCLUDE)
install(DIRECTORY proto/tandem/v1 DESTINATION ${CMAKE_INSTALL_DATADIR}/tandem/proto/tandem)
install(DIRECTORY models/demo DESTINATION ${CMAKE_INSTALL_DATADIR}/tandem/models)
install(CODE "
  set(completions \"\$ENV{DESTDIR}\${CMAKE_INSTALL_PREFIX}/${CMAKE_INSTALL_DATADIR}/bash-completion/completions\")
  file(MAKE_DIRECTORY \"\${completions}\")
  execute_process(COMMAND $<TARGET_FILE:tandem> completion bash OUTPUT_FILE \"\${completions}/tandem\" COMMAND_ERROR_IS_FATAL ANY)")
